"""Clips on Wan's twin: rewards train on pairs of clips, methods on their latents, and commands take or refuse them."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence
from torch.utils.data import DataLoader

from latentreward.alignment import PixelReward, Sampling
from latentreward.apps.cli import main
from latentreward.apps.commands.cache import cache
from latentreward.apps.generation.image_folder import ImageFolder, draw_images
from latentreward.core.contracts import NoisyStates, PromptBatch
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.core.reports.drawing import to_images
from latentreward.data import JSONLPairReader, PreferenceDataModule
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.data.image_sizes import OneSize
from latentreward.diffusion import CachedPreferenceDataModule, CachedSplit
from latentreward.diffusion.cache.sources import ImageSettings, PipelineEncoders
from latentreward.diffusion.cache.store import read_plan
from latentreward.reward import CallableScorer, DiNaLRMModule, GatedQFormerHead, ThurstoneLoss
from latentreward.reward.scoring.stored import sizes_of, sizes_record
from tests.alignment.modules.lpo_runs import make_trainer
from tests.apps.evaluation.policy.toy_scorers import redness
from tests.clips import write_clip
from tests.data.test_clips import pairs
from tests.diffusion.families.test_every_command import QUIET, run
from tests.diffusion.families.test_methods import METHODS
from tests.diffusion.families.twins import PROMPTS, TWINS
from tests.marks import rotated_after

WAN = TWINS["wan21"]
SIZE, FRAMES = 32, 5
SAMPLING = Sampling(3, height=SIZE, width=SIZE, frames=FRAMES)
LATENTS = (16, 2, SIZE // 8, SIZE // 8)


def reward_module() -> DiNaLRMModule:
    backbone = create_backbone("wan21", source=WAN.folder, visual_taps=[1, 2], text_taps=[1], tuning="lora")
    torch.manual_seed(0)
    return DiNaLRMModule(
        backbone, lambda spec: GatedQFormerHead(spec, num_queries=2, num_heads=2), ThurstoneLoss(), posterior="mode"
    )


def write_cache(folder: Path, file: str) -> None:
    encoder = PipelineEncoders(WAN.folder, posterior="mode", batch_size=4)
    images = ImageSettings(SIZE, resize="stretch", frames=FRAMES)
    cache(str(folder), JSONLPairReader(file), encoder, images, "float32", num_workers=0, device="cpu")


@pytest.mark.slow
def test_a_reward_trains_alike_on_clips_and_on_their_cache(tmp_path: Path) -> None:
    file, module = pairs(tmp_path), reward_module()
    write_cache(tmp_path / "cache", file)
    shared: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "shuffle": False}
    direct = PreferenceDataModule(SIZE, train=JSONLPairReader(file), frames=FRAMES, **shared)
    cached = CachedPreferenceDataModule(train=CachedSplit(str(tmp_path / "cache")), **shared)
    losses = []
    for data in (direct, cached):
        (batch,) = data.train_dataloader()
        losses.append(module.training_step(batch, 0)["loss"])
        assert str(data.datasets["train"].image_sizes) == "32x32, clips of 5 frames at 16 per second"
    assert batch.chosen.shape == (4, *LATENTS)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    make_trainer(tmp_path / "run", max_steps=2).fit(module, datamodule=direct)
    assert module.model.image_sizes == OneSize(SIZE, SIZE, "stretch", FRAMES)


@pytest.mark.parametrize("method", rotated_after(1, ["lpo", "grpo_stepwise", "grpo_trajectory", "refl"]))
def test_methods_take_two_steps_on_clips(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.diffusion.families.test_methods.sampling", lambda twin: SAMPLING)
    module = METHODS[method](WAN, WAN.source())
    shapes, predict = set(), module.policy.predict

    def spy(latents: torch.Tensor, *others: Any) -> torch.Tensor:
        shapes.add(tuple(latents.shape[1:]))
        return predict(latents, *others)

    monkeypatch.setattr(module.policy, "predict", spy)
    before = {name: weight.detach().clone() for name, weight in module.policy.named_parameters() if "lora_B" in name}
    data: Any = PromptLoaders(PROMPTS, batch_size=2, prompts_per_rollout=2, batches_per_epoch=2, seed=1)
    if method == "refl":
        data = DataLoader([PromptBatch(PROMPTS, ("0/0", "0/1"))] * 2, batch_size=None)
    keys = {"train_dataloaders": data} if isinstance(data, DataLoader) else {"datamodule": data}
    make_trainer(tmp_path, max_steps=2, max_epochs=-1).fit(module, **keys)
    assert shapes == {LATENTS}
    after = dict(module.policy.named_parameters())
    assert before and all(not torch.equal(after[name], weight) for name, weight in before.items())


def test_clips_are_written_as_animated_webp(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "made", {"seed": 0})
    pixels = torch.rand(2, 3, FRAMES, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder.add(draw_images([(0, 0), (1, 0)], ["a cat", "a dog"], pixels, None, 0))
    with Image.open(tmp_path / "made" / "00000_0_a-cat.webp") as clip:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(clip)]
        assert clip.n_frames == FRAMES and clip.is_animated and clip.info["loop"] == 0
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in to_images(pixels[0])]
    folder.write_grid([(0, 0), (1, 0)])
    assert Image.open(tmp_path / "made" / "grid.png").width > 2 * 4 * 32
    again = ImageFolder(tmp_path / "made", {"seed": 0})
    assert again.missing([(0, 0), (1, 0)], ["a cat", "a dog"]) == []


def test_records_of_clips_are_read_again() -> None:
    assert sizes_of(sizes_record(OneSize(8, 8))) == OneSize(8, 8)
    clips = OneSize(8, 8, "stretch", 5, 8.0)
    assert sizes_of(sizes_record(clips)) == clips
    with pytest.raises(InputError, match=r"^fps=0 must lie in"):
        sizes_of({"class": "OneSize", "init_args": {"height": 8, "width": 8, "frames": 5, "fps": 0.0}})


def score_rows(table: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(table).read_text().splitlines()))


def test_clips_are_refused_where_images_are_taken(tmp_path: Path) -> None:
    clip = PreferenceDataModule(SIZE, train=JSONLPairReader(pairs(tmp_path)), frames=4, num_workers=0)
    model, pixels = reward_module().model, torch.zeros(1, 3, SIZE, SIZE)
    model.image_sizes = OneSize(SIZE, SIZE, frames=FRAMES)
    reward, noise = PixelReward(CallableScorer(redness, "red")).load(WAN.source().load()), torch.zeros(1, *LATENTS)
    states = NoisyStates(noise, torch.zeros(1), torch.zeros(1, dtype=torch.int64), noise)
    for key, call in (
        ("frames=5", lambda: SAMPLING.sampler(TWINS["qwen_image"].source().resolve_family())),
        ("multiple of 4", lambda: Sampling(frames=4).latent_shape(WAN.source().resolve_family())),
        ("data.frames=4", lambda: make_trainer(tmp_path, max_steps=1).fit(reward_module(), datamodule=clip)),
        ("images.frames=5", lambda: ImageSettings(frames=5)),
        ("sampling.frames=5", lambda: SAMPLING.require_images("evaluate-policy")),
        ("sampling.frames", lambda: reward(states, reward.encode_prompts(["a"]))),
        ("clips of 5 frames", lambda: model.require_images("serve")),
        ("trained on 5", lambda: model.score("a", pixels)),
        ("images have 9 frames", lambda: model.score("a", pixels.unsqueeze(2).repeat(1, 1, 9, 1, 1))),
    ):
        with pytest.raises(InputError, match=key):
            call()


@pytest.mark.rotated
@pytest.mark.slow
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cache, fit, publish and score clips."""
    monkeypatch.chdir(tmp_path)
    file = pairs(Path("pairs"))
    reader = {"class_path": "latentreward.data.JSONLPairReader", "init_args": {"file": file}}
    encoder = {"class_path": "PipelineEncoders", "init_args": {"source": WAN.folder, "batch_size": 4}}
    images = {"size": SIZE, "resize": "stretch", "frames": FRAMES}
    settings = {"reader": reader, "encoder": encoder, "images": images, "num_workers": 0, "device": "cpu"}
    run("cache", settings, "cache")
    assert read_plan(Path("cache")).spec.images.frames == FRAMES
    main(["cache", "cache", "--check"])
    backbone = {"source": WAN.folder, "visual_taps": [1, 2], "text_taps": [1, 2], "tuning": "lora"}
    head = {"class_path": "GatedQFormerHead", "init_args": {"num_queries": 2, "num_heads": 2}}
    arguments = {"backbone": {"class_path": "wan21", "init_args": backbone}, "head": head,
                 "loss": {"class_path": "ThurstoneLoss"}}  # fmt: skip
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 2, **QUIET}
    keep = ["TrainableCheckpoint", "LastCheckpoint"]
    run("fit", {"model": {"class_path": "latentreward.reward.DiNaLRMModule", "init_args": arguments},
                "data": {"class_path": "latentreward.diffusion.CachedPreferenceDataModule",
                         "init_args": {"train": {"cache": "cache"}, "batch_size": 4, "num_workers": 0}},
                "trainer": {**trainer, "default_root_dir": "reward", "callbacks": keep}})  # fmt: skip
    Image.new("RGB", (SIZE, SIZE)).save("pairs/a.png")
    write_clip(Path("pairs/short.mp4"), [0, 10])
    names = ("good0.mp4", "bad0.mp4", "a.png", "short.mp4")
    Path("pairs/list.csv").write_text("image,prompt\n" + "".join(f"{name},a red clip\n" for name in names))
    main(["publish", "reward", "published", "--licence=mit"])
    base = f"--base={WAN.folder}"
    for model, options in (("reward", ["--gallery=page.html"]), ("published", [base])):
        main(["score", "pairs/list.csv", f"{model}.csv", f"--model={model}", "--device=cpu", *options])
    first, second = score_rows("reward.csv"), score_rows("published.csv")
    assert [float(row["score"]) for row in first[:2]] == pytest.approx([float(row["score"]) for row in second[:2]])
    assert "no whole mp4" in first[2]["problem"] and "2 of frames=5" in first[3]["problem"]
    assert "4 frames of clips longer than the training's were not used" in capsys.readouterr().out
    assert Path("page.html").read_text().count("data:image/webp") == 2
    with pytest.raises(SystemExit):
        main(["serve", "published", base, "--port=0", "--device=cpu"])
    assert "was trained on clips of 5 frames, but serve takes images" in capsys.readouterr().err
