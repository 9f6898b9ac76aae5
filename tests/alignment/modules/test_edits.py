"""Alignment of editors: every method takes prompts with pictures, and holds the pictures fixed."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import EncodeOnce, HackingMonitor
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from latentreward.alignment import (
    AlignmentModule,
    AWMModule,
    Branching,
    DiffusionDPOModule,
    DiffusionNFTModule,
    LatentReward,
    LPOModule,
    RAMModule,
    RandomReward,
    ReFLModule,
    RewardMixture,
    RolloutDraws,
    Sampling,
    StepwiseGRPOModule,
    TrajectoryGRPOModule,
    UnchangedRegion,
    candidate_steps,
    sample_latents,
)
from latentreward.alignment.rewards.latent import EncodedPrompts, LatentScorer
from latentreward.core.contracts import Conditioning, EditPrompt, ImageRef, PromptBatch, sources_of
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.data import JSONLPairReader, PairDataset, PixelLoader, PreferenceDataModule, decode_image
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.reward import CallableScorer, DiNaLRMModule, GatedQFormerHead, RewardModel, ThurstoneLoss
from tests.alignment.modules.lpo_runs import make_trainer, weights
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.diffusion.families.made_qwen_image_edit import picture
from tests.diffusion.families.test_methods import DifferentiableChannel, pairs, rolled
from tests.diffusion.families.twins import TWINS
from tests.distributed.ranks import on_ranks
from tests.marks import rotated_after

KLEIN = TWINS["klein_base"]
TEXTS = ("make it red", "make it red", "remove the dog")
ROLLED: dict[str, Any] = {
    "lpo": rolled(LPOModule, candidates=Branching(2)),
    "grpo_stepwise": rolled(StepwiseGRPOModule, candidates=Branching(2)),
    "grpo_trajectory": rolled(TrajectoryGRPOModule, num_trajectories=2),
    "nft": rolled(DiffusionNFTModule, num_samples=2),
    "awm": rolled(AWMModule, num_samples=2, sampling=Sampling(8, height=32, width=48)),
    "ram": rolled(RAMModule, num_samples=2, draws=2),
    "refl": rolled(ReFLModule, DifferentiableChannel, stop_range=(1, 2)),
}


def edits(folder: Path, texts: Sequence[str] = TEXTS, pictures: int = 1) -> tuple[EditPrompt, ...]:
    """Prompts with pictures of unlike colours and sizes."""
    found = []
    for number, text in enumerate(texts):
        refs = []
        for place in range(pictures):
            name = f"{number}-{place}.png"
            if not (folder / name).exists():  # ranks read them at the same time
                Image.new("RGB", (72 + 16 * number, 64), (80 * number, 40 * place, 200)).save(folder / name)
            refs.append(ImageRef(name, path=folder / name, root=folder))
        found.append(EditPrompt(text, refs))
    return tuple(found)


@pytest.mark.parametrize("edited", [True, False])
def test_prompts_that_a_reward_does_not_take_are_refused_before_it_scores(
    edited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = create_backbone("flux2_klein", source=KLEIN.folder, visual_taps=[1], text_taps=[1])
    judge = RewardModel(backbone, GatedQFormerHead(backbone.feature_spec, num_heads=2))
    judge.edits = not edited
    judge.save_pretrained(tmp_path / "reward")
    monkeypatch.setattr(LPOModule, "on_fit_start", lambda module: pytest.fail("the reward scores"))
    rewards: list[Any] = [LatentReward(str(tmp_path / "reward"), base=str(KLEIN.folder))]
    told = ["takes 0 pictures to edit" if edited else "takes at least 1 pictures to edit"]
    if not edited:
        rewards.append(RewardMixture([RandomReward(), UnchangedRegion()], [1.0, 1.0]))
        told.append("a prompt edits no picture number 0; give prompts with source_images")
    prompts = edits(tmp_path)[:2] if edited else TEXTS[:2]
    with monkeypatch.context() as unread:  # a scorer that is not moved reads weights at its first use alone
        scorer = rewards[0].load(KLEIN.source().load(0))
        unread.setattr(LatentScorer, "read_weights", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(InputError, match=told[0]):
            scorer.check_prompts(prompts)
    for reward, problem in zip(rewards, told, strict=True):
        module = LPOModule(KLEIN.source(), reward, sampling=Sampling(2, height=32, width=48))
        with pytest.raises(InputError, match=problem):
            make_trainer(tmp_path).fit(module, TwoBatches(prompts))


class TwoBatches(LightningDataModule):
    """The first two prompts, twice."""

    def __init__(self, prompts: tuple[str, ...]) -> None:
        super().__init__()
        self.prompts = prompts

    def train_dataloader(self) -> Any:
        return DataLoader([PromptBatch(self.prompts[:2], ("0/0", "0/1"))] * 2, batch_size=None)


def trained(
    module: AlignmentModule, folder: Path, prompts: tuple[str, ...], callbacks: Any = (), **options: Any
) -> Any:
    data: Any = PromptLoaders(prompts, batch_size=2, prompts_per_rollout=2, batches_per_epoch=4, seed=1)
    keys = {"datamodule": data}
    if isinstance(module, ReFLModule):
        keys = {"datamodule": TwoBatches(prompts)}
    make_trainer(folder, max_epochs=-1, callbacks=callbacks, **{"max_steps": 2, **options}).fit(module, **keys)
    return weights(module)


@pytest.mark.slow
@pytest.mark.parametrize("method", rotated_after(1, [*ROLLED]))
def test_methods_train_on_the_pictures(method: str, tmp_path: Path) -> None:
    """Other pictures give other weights, and the same ones the same."""
    prompts = edits(tmp_path)
    found = [trained(ROLLED[method](KLEIN, KLEIN.source()), tmp_path, prompts) for _ in range(2)]
    for prompt in prompts:
        Image.new("RGB", (48, 64), (0, 255, 0)).save(tmp_path / prompt.sources[0].image_key)
    found.append(trained(ROLLED[method](KLEIN, KLEIN.source()), tmp_path, prompts))
    same, again, other = (torch.cat([weight.flatten() for weight in one.values()]) for one in found)
    assert torch.equal(same, again) and not torch.equal(same, other)


class Ratios(Callback):
    """Compares the log-probabilities of a batch of step-wise GRPO with those of the rollout."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            now = pl_module.transition(batch)
            log_prob = torch.stack([now.log_prob(each) for each in batch.next_latents.unbind(1)], dim=1)
        self.found.append((log_prob - batch.log_prob).abs().max().item())


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_a_policy_that_does_not_move_has_ratios_of_one(guidance: float | None, tmp_path: Path) -> None:
    """Rows hold the pictures' keys and the memory their latents, so that the update predicts what the rollout did."""
    module = StepwiseGRPOModule(
        KLEIN.source(), FirstChannelReward(), guidance_scale=guidance, candidates=Branching(2), seed=0,
        sampling=Sampling(4, height=32, width=48), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
    )  # fmt: skip
    ratios = Ratios()
    trained(module, tmp_path, edits(tmp_path, pictures=2), [ratios])
    assert ratios.found and max(ratios.found) < 1e-5


def test_pictures_as_the_pipeline_sizes_them_must_be_alike_in_a_batch(tmp_path: Path) -> None:
    policy = KLEIN.source(source_size="pipeline").load()
    prompts = edits(tmp_path)
    with pytest.raises(InputError, match="pictures to edit of unlike sizes are in one batch; set source_size: made"):
        policy.encode_prompts(prompts)
    assert policy.encode_prompts(prompts[:1]).source_latents[0].shape[-2:] == (16, 18)
    with pytest.raises(InputError, match="edit 1 and 2 pictures are in one batch"):
        policy.encode_prompts([prompts[0], EditPrompt("x", prompts[0].sources * 2)])
    both = policy.encode_prompts([EditPrompt("x", prompts[0].sources * 2)]).source_latents
    assert torch.equal(*both)


def test_pictures_get_the_size_of_those_that_are_made(tmp_path: Path) -> None:
    """Also without a run: the native size when a policy is loaded, then that of what is sampled."""
    policy, prompts = KLEIN.source().load().eval(), PromptBatch(edits(tmp_path)[:2], ("a", "b"))
    assert policy.source_encoder.loader == PixelLoader(*policy.native_size, "center_crop", exif="apply")
    sampling = Sampling(2, height=32, width=48)
    sample_latents(policy, prompts, sampling, 1.0, seed=0)
    assert policy.encode_prompts(prompts.prompts).source_latents[0].shape[1:] == sampling.latent_shape(policy.family)
    sampling = Sampling(2, height=48, width=32).with_noise()
    settings = Branching(2), sampling, 1.0, RolloutDraws(0, prompts.keys)
    next(
        candidate_steps(policy, sampling.sampler(policy.family), FirstChannelReward().load(policy), prompts, *settings)
    )
    assert policy.encode_prompts(prompts.prompts).source_latents[0].shape[1:] == sampling.latent_shape(policy.family)


def test_latents_made_while_validating_serve_training(tmp_path: Path) -> None:
    policy, (first, second) = KLEIN.source().load(), [(tmp_path / name) for name in "ab"]
    policy.edit_at(64, 64)
    with torch.inference_mode():
        kept = policy.encode_prompts(edits(tmp_path)[:1]).source_latents[0]
    again = policy.encode_prompts(edits(tmp_path)[:1]).source_latents[0]
    assert torch.equal(kept, again) and not again.is_inference()
    for folder, shade in ((first, 0), (second, 255)):
        folder.mkdir()
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(folder / "0-0.png")
    unlike = [policy.encode_prompts(edits(folder)[:1]).source_latents[0] for folder in (first, second)]
    assert not torch.equal(*unlike)


def test_a_network_for_text_alone_refuses_pictures(tmp_path: Path) -> None:
    policy = TWINS["flux1_dev"].source().load()
    with pytest.raises(InputError, match="the prompt 'make it red' edits a picture, but the network makes"):
        policy.encode_prompts(edits(tmp_path))


def test_a_reward_of_text_alone_is_named_where_the_policy_edits(tmp_path: Path) -> None:
    """Kontext makes pictures from text too, so that the two fit until a prompt has pictures."""
    flux = TWINS["flux1_dev"]
    backbone = create_backbone("flux1", source=flux.folder, visual_taps=(1, 2), text_taps=(1,))
    RewardModel(backbone, GatedQFormerHead(backbone.feature_spec, num_heads=2)).save_pretrained(str(tmp_path / "r"))
    reward = LatentReward(str(tmp_path / "r"), base=flux.folder).load(TWINS["flux1_kontext"].source().load())
    with pytest.raises(InputError, match=r"^reward .*/r: it takes 0 pictures to edit, and a prompt edits 1"):
        reward.encode_prompts(edits(tmp_path)[:1])


@pytest.mark.slow
def test_a_reward_tells_whether_it_was_trained_on_edits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kontext learns both, and only such pictures are scored then; a reward without the record takes both."""
    (edit,), kontext, flux = edits(tmp_path, TEXTS[:1]), TWINS["flux1_kontext"], TWINS["flux1_dev"].source()
    picture(32, 48, 9).save(tmp_path / "other.png")
    row = {"prompt": str(edit), "source_images": [edit.sources[0].image_key], "chosen": "0-0.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**row, "rejected": "other.png"}))
    for sources, edited in (("read", True), ("ignore", False)):
        torch.manual_seed(0)
        backbone = create_backbone("flux1_kontext", source=kontext.folder, visual_taps=(1, 2), text_taps=(1,))
        module = DiNaLRMModule(backbone, GatedQFormerHead, ThurstoneLoss(), seed=0)
        data = PreferenceDataModule(
            (32, 48), train=JSONLPairReader(str(tmp_path / "pairs.jsonl"), sources=sources), batch_size=1, num_workers=0
        )
        (trainer := make_trainer(tmp_path, max_steps=1)).fit(module, data)
        assert module.model.edits is edited
        trainer.save_checkpoint(tmp_path / "reward.ckpt")
        resumed = DiNaLRMModule(backbone, GatedQFormerHead, ThurstoneLoss(), seed=0)
        resumed.on_load_checkpoint(torch.load(tmp_path / "reward.ckpt", weights_only=True))
        assert resumed.model.edits is edited
        other = PreferenceDataModule(
            (32, 48),
            val=JSONLPairReader(str(tmp_path / "pairs.jsonl"), sources="ignore" if edited else "read", split="val"),
            batch_size=1,
            num_workers=0,
        )
        make_trainer(tmp_path).validate(resumed, other)
        assert f"with edits: {edited}, the data now have edits: {not edited}; set the reader's sources" in caplog.text
        module.model.save_pretrained(folder := tmp_path / sources)
        found = LatentReward(str(folder), base=kontext.folder)
        for stored in (found, LatentReward(str(tmp_path / "reward.ckpt"))):
            stored.require_latents_of(kontext.source())
            told = "it judges edits of pictures, and the policy makes pictures made from text"
            with pytest.raises(InputError, match=told) if edited else nullcontext():
                stored.require_latents_of(flux)
        scorer = found.load(kontext.source().load())
        scorer.encode_prompts([edit] if edited else [str(edit)])
        with pytest.raises(
            InputError, match=f"it takes {int(edited)} pictures? to edit, and a prompt edits {1 - edited}"
        ):
            scorer.encode_prompts([str(edit)] if edited else [edit])
        config = json.loads((folder / "config.json").read_text())
        assert config.pop("edits") is edited
        (folder / "config.json").write_text(json.dumps(config))
        old = LatentReward(str(folder), base=kontext.folder)
        old.require_latents_of(flux)
        old.load(kontext.source().load()).encode_prompts([edit])


@pytest.mark.slow
def test_text_encoders_can_be_freed(tmp_path: Path) -> None:
    """EncodeOnce gives the weights of a run without it, with a reward on the same network too."""
    prompts, found = edits(tmp_path), []
    for callbacks in ([], [EncodeOnce(str(tmp_path))]):
        found.append(trained(ROLLED["lpo"](KLEIN, KLEIN.source()), tmp_path, prompts, callbacks))
    assert all(torch.allclose(value, found[1][name], atol=1e-6) for name, value in found[0].items())


def test_diffusion_dpo_learns_from_edits(tmp_path: Path) -> None:
    found = []
    for shade in (0.0, 1.0):
        module = DiffusionDPOModule(KLEIN.source(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), seed=0)
        batch = pairs(module.policy, KLEIN)
        source = torch.full_like(batch.chosen, shade)
        prompts = tuple(EditPrompt(prompt, [ImageRef("one")]) for prompt in batch.prompts)
        data = DataLoader(
            [type(batch)(**{**vars(batch), "prompts": prompts, "sources": (source,)})] * 2, batch_size=None
        )
        make_trainer(tmp_path, max_steps=2, max_epochs=-1).fit(module, train_dataloaders=data)
        found.append(torch.cat([weight.flatten() for weight in weights(module).values()]))
    assert not torch.equal(*found)


def test_a_monitor_of_another_size_scores_edits_at_its_own(tmp_path: Path) -> None:
    """The reward compares results with their pictures, which have the run's size again afterwards."""
    seen: list[tuple[int, int]] = []

    def widths(prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        seen.extend(image.size for image in images)
        assert all(map(sources_of, prompts))
        return torch.zeros(len(images))

    watch = HackingMonitor(
        edits(tmp_path), CallableScorer(widths, "none"), every_n_steps=1, sampling=Sampling(2, height=48, width=32)
    )
    module = ReFLModule(
        KLEIN.source(), UnchangedRegion(), guidance_scale=1.0, stop_range=(1, 2), seed=0,
        sampling=Sampling(4, height=32, width=48),
    )  # fmt: skip
    trained(module, tmp_path, edits(tmp_path), [watch], max_steps=1)
    assert seen == [(32, 48)] * 6  # the reference, and after the step
    assert module.policy.source_encoder.loader == PixelLoader(32, 48, "center_crop", exif="apply")


def run(folder: Path, processes: int = 1, path: Path | None = None) -> dict[str, Tensor]:
    """Three steps of LPO with a checkpoint after each, from one in mid rollout if there is a path."""
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    module, size = ROLLED["lpo"](KLEIN, KLEIN.source()), 2 // processes
    data = PromptLoaders(edits(folder), batch_size=size, prompts_per_rollout=size, batches_per_epoch=4, seed=1)
    strategy = "auto" if processes == 1 else "ddp"
    trainer = make_trainer(folder, strategy, [saver], max_steps=3, max_epochs=-1, enable_checkpointing=True)
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return weights(module)


def run_of_two(folder: Path) -> dict[str, Tensor]:
    """On a rank."""
    return run(folder, 2)


@pytest.mark.slow
def test_a_resumed_run_and_one_of_two_processes_edit_the_same_pictures(tmp_path: Path) -> None:
    whole = run(tmp_path)
    resumed = run(tmp_path, path=tmp_path / "saved" / "step=1.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    (tmp_path / "two").mkdir()
    edits(tmp_path / "two")
    for rank in on_ranks("tests.alignment.modules.test_edits:run_of_two", tmp_path / "two"):
        for name, value in whole.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-3, atol=1e-5)


def test_an_empty_prompt_for_each_edit_goes_with_its_rows() -> None:
    """Of a text encoder that sees pictures: four prompts, each with two candidates in unlike order."""
    tokens = torch.arange(4.0).view(4, 1, 1)
    prompts = EncodedPrompts(Conditioning(tokens), Conditioning(-tokens))
    rows = torch.tensor([3, 0, 0, 2, 1])
    chosen, empty = prompts.select(rows)
    assert torch.equal(chosen.prompt_embeds, -empty.prompt_embeds)
    one = EncodedPrompts(Conditioning(tokens), Conditioning(tokens[:1])).select(rows)[1]
    assert len(one) == 1 and len(one.beside(chosen)) == 5
    with pytest.raises(InputError, match="the empty prompt has 4 rows for 5 prompts"):
        prompts.uncond.beside(chosen)


@pytest.mark.parametrize("source_size", ["made", "pipeline"])
def test_a_photograph_is_turned_upright(source_size: str, tmp_path: Path) -> None:
    upright = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    policy = KLEIN.source(source_size=source_size).load()
    policy.edit_at(32, 48)
    refs = [ImageRef(name, path=tmp_path / name) for name in ("upright.png", "lying.png")]
    latents = [policy.encode_prompts([EditPrompt("x", [ref])]).source_latents[0] for ref in refs]
    assert torch.equal(*latents)


def test_a_placeholder_has_pictures_of_its_own(tmp_path: Path) -> None:
    """Else the grey latents of a damaged result would be kept in the place of its source's."""
    (edit,) = edits(tmp_path, TEXTS[:1])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    row = {"prompt": str(edit), "source_images": [edit.sources[0].image_key], "chosen": "0-0.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**row, "rejected": "broken.png"}))
    reader = JSONLPairReader(str(tmp_path / "pairs.jsonl"), on_error="placeholder")
    loaded = PairDataset(reader, PixelLoader(32, 48))[0]
    (source,) = sources_of(loaded.pair.prompt)
    assert source != edit.sources[0]
    assert decode_image(source).getcolors() == [(64 * 64, (128, 128, 128))]  # for text encoders that see it
    assert loaded.pair.label_a is None
    assert len(loaded.sources) == 1 and (loaded.sources[0] == 0).all()


def test_a_run_over_unlike_numbers_of_pictures_goes_on_with_another_batch_size(tmp_path: Path) -> None:
    for number in range(9):
        picture(32, 32, number).save(tmp_path / f"{number}.png")
    rows = [
        {
            "prompt": f"p{row}",
            "source_images": ["0.png", "1.png"][: 1 + row % 2],
            "chosen": f"{row}.png",
            "rejected": "8.png",
        }
        for row in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    states = []
    for batch_size in (1, 2):
        reader = JSONLPairReader(str(tmp_path / "pairs.jsonl"))
        data = PreferenceDataModule(32, train=reader, batch_size=batch_size, num_workers=0, seed=0)
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        if states:
            loader.load_state_dict(states[0])
        batches = iter(loader)
        seen = [*next(batches).pair_ids] if not states else [name for batch in batches for name in batch.pair_ids]
        states.append(loader.state_dict())
        if batch_size == 1:
            first = seen
    assert sorted(first + seen) == sorted(f"pairs.jsonl:{row}" for row in range(1, 9))
