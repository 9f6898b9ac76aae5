"""Caches for a text encoder that sees the pictures to edit: the embeddings belong to a text with its pictures."""

import shutil
from pathlib import Path

import pytest
import torch

from latentreward.alignment import PolicySource, StepAwarePixelModule
from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.data import PreferenceDataModule
from latentreward.diffusion import find_family
from latentreward.diffusion.cache.datamodule import CachedPairDataset, CachedPairs, CacheIndex
from latentreward.diffusion.cache.store import PROMPTS
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.reward import CLIPProjectionHead, DiNaLRMModule, GatedQFormerHead, LRMLoss, LRMModule, ThurstoneLoss
from latentreward.reward.modules.reward import PairDraws
from tests.diffusion.cache.test_datamodule import cached, fit
from tests.diffusion.cache.test_edits import SOURCES_OF, TEXTS, Edits, arguments, pictures
from tests.diffusion.cache.writing import contents, stored, table
from tests.diffusion.families.made_qwen_image_edit import qwen_image_edit_folder
from tests.marks import rotated_after
from tests.reward.scorers.tiny_clip import write_clip

__all__ = ["pictures"]
DISTINCT = list(dict.fromkeys((TEXTS[row % len(TEXTS)], SOURCES_OF[row]) for row in range(len(SOURCES_OF))))
"""Text and pictures of each prompt, in the order of the pairs; a text is there with several pictures."""


def write(output: Path, root: Path, *settings: str) -> Path:
    own = (f"--encoder.source={qwen_image_edit_folder()}", "--encoder.posterior=mode", "--encoder.text=true")
    main(arguments(output, root, *own, "--reader.pictures=2", *settings))
    return output


@pytest.fixture(scope="module")
def written(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seen")
    caches = {"float32": (), "float16": ("--dtype=float16",), "uneven": ("--reader.pictures=3", "--num_workers=1")}
    return {name: write(folder / name, pictures, *settings) for name, settings in caches.items()}


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return find_family(PolicySource(qwen_image_edit_folder()).pipeline()).load_prompt_encoder().eval()


def states(cache: Path) -> list[torch.Tensor]:
    """Embeddings of each row of the prompts' table."""
    return stored(cache, "text", "prompt_embeds")


@pytest.mark.slow
def test_a_text_is_encoded_once_with_each_of_its_pictures(
    written: dict[str, Path], encoder: PromptEncoder, pictures: Path
) -> None:
    rows = table(written["float32"], PROMPTS)
    assert [row["prompt"] for row in rows] == ["", *(text for text, _ in DISTINCT)]
    reader, stored = Edits(str(pictures), 2), states(written["float32"])
    for row, found in zip(rows[1:], stored[1:], strict=True):
        prompt = reader[row["reader_row"]].prompt
        with torch.no_grad():
            torch.testing.assert_close(found, encoder([prompt]).prompt_embeds[0], rtol=1e-5, atol=1e-5)
    reds = [found for row, found in zip(rows, stored, strict=True) if row["prompt"] == TEXTS[0]]
    assert len(reds) == 3 and not torch.allclose(reds[0], reds[1], atol=1e-2)


def reward() -> DiNaLRMModule:
    torch.manual_seed(0)
    backbone = create_backbone(
        "qwen_image_edit", source=qwen_image_edit_folder(), num_layers=2, visual_taps=[1, 2], text_taps=[2]
    )
    return DiNaLRMModule(backbone, GatedQFormerHead, ThurstoneLoss(), eval_sigmas=[0.5], posterior="mode", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"),
    rotated_after(2, [("float32", 1e-5), ("uneven", 1e-5), ("float16", 2e-3)]),
)
def test_training_from_the_cache_gives_the_losses_of_training_from_pictures(
    name: str, tolerance: float, written: dict[str, Path], pictures: Path
) -> None:
    settings = {"batch_size": 4, "num_workers": 0, "seed": 0}
    data = (
        PreferenceDataModule(32, resize="center_crop", train=Edits(str(pictures), 2 + (name == "uneven")), **settings),
        cached(written[name], **settings),
    )
    wanted, got = (fit(reward(), one, max_epochs=1) for one in data)
    assert got.pairs == wanted.pairs and len(got.values) == 2
    torch.testing.assert_close(torch.tensor(got.values), torch.tensor(wanted.values), rtol=tolerance, atol=tolerance)
    learner, batches = reward(), [next(iter(one.train_dataloader())) for one in data]
    encoded = [learner.encode(batch, PairDraws(batch, 0, 0)).conditioning for batch in batches]
    assert batches[1].uncond is None and batches[1].conditioning is not None
    for field in ("prompt_embeds", "prompt_mask", "source_latents"):
        want, found = (getattr(one, field) for one in encoded)
        torch.testing.assert_close(found, want, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.slow
def test_pairs_of_unlike_numbers_of_pictures_and_runs_that_go_on(
    written: dict[str, Path], encoder: PromptEncoder, pictures: Path, tmp_path: Path
) -> None:
    reader = Edits(str(pictures), 3)
    pairs = CachedPairs(index := CacheIndex(written["uneven"]))
    for row in range(4):
        batch = CachedPairDataset(index, pairs.rows).__getitems__([row])
        with torch.no_grad():
            want = encoder([reader[row].prompt]).prompt_embeds
        torch.testing.assert_close(batch.conditioning.prompt_embeds, want, rtol=1e-5, atol=1e-5)
    again = Path(shutil.copytree(written["uneven"], tmp_path / "again"))
    for path in [*again.glob("text-*"), again / PROMPTS]:
        path.unlink()
    write(again, pictures, "--reader.pictures=3")
    assert contents(again) == contents(written["uneven"])


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["header", "end"])
def test_unreadable_pictures_follow_on_error(
    damaged: str, written: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    whole = (pictures / "source 0.jpg").read_bytes()
    (root / "source 0.jpg").write_bytes(b"no picture" if damaged == "header" else whole[: len(whole) // 2])
    with pytest.raises(SystemExit):
        write(tmp_path / "raised", root)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'source 0'" in error and "set the reader's on_error to skip" in error
    write(tmp_path / "skipped", root, "--reader.on_error=skip")
    lost = [f"pair {row}" for row, numbers in enumerate(SOURCES_OF) if 0 in numbers]
    told = {"header": f"dropped pairs: {len(lost)} unknown", "end": "('source 0'); pairs with them"}
    assert told[damaged] in capsys.readouterr().out
    kept = CachedPairs(CacheIndex(tmp_path / "skipped"))
    assert {*kept.pair_ids()} == {f"pair {row}" for row in range(len(SOURCES_OF))} - {*lost}
    whole_rows, rows = (table(cache, PROMPTS) for cache in (written["float32"], tmp_path / "skipped"))
    wanted = dict(zip((row["reader_row"] for row in whole_rows), states(written["float32"]), strict=True))
    for row, found in zip(rows[1:], states(tmp_path / "skipped")[1:], strict=True):
        if f"pair {row['reader_row']}" not in lost:
            torch.testing.assert_close(found, wanted[row["reader_row"]], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_refuses_a_cache_that_lacks_what_the_model_reads_of_the_pictures(
    written: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"write the cache with encoder\.text: true"):
        fit(reward(), cached(written["float32"], cached_text=False), max_epochs=1)
    taps = {"visual_taps": [2], "text_taps": [2]}
    backbone = create_backbone("qwen_image_edit", source=qwen_image_edit_folder(), **taps)
    guided = LRMModule(backbone, CLIPProjectionHead, LRMLoss(), eval_sigmas=[0.5], seed=0)
    with pytest.raises(InputError, match=r"the empty prompt for the head; .* guidance: 1"):
        fit(guided, cached(written["float32"]), max_epochs=1)
    clip = write_clip(tmp_path / "clip")
    scorer = StepAwarePixelModule(PolicySource(qwen_image_edit_folder()), clip, posterior="mode", seed=0)
    with pytest.raises(InputError, match=r"the empty prompt for guidance_scale; set guidance_scale to 1,"):
        fit(scorer, cached(written["float32"]), max_epochs=1)
    trained = reward()
    trained.model.backbone.text_encoder.requires_grad_(True)
    with pytest.raises(InputError, match="the model trains its text encoder; train from the images"):
        fit(trained, cached(written["float32"]), max_epochs=1)
