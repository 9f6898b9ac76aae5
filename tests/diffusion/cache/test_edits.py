"""Caches of edits: every source is encoded once, to the posterior's mode, and read beside the images."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import DiffusionDPOModule
from latentreward.apps.cli import main
from latentreward.core.contracts import EditPrompt, ImageRef, PreferencePair, sources_of
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.data import OnError, PairReader, PixelLoader, PreferenceDataModule
from latentreward.diffusion import find_family
from latentreward.diffusion.cache.datamodule import CachedPairDataset, CachedPairs, CacheIndex
from latentreward.diffusion.cache.store import IMAGES, PAIRS, PROMPTS, read_plan
from latentreward.diffusion.encoders.vae import LatentEncoder
from latentreward.reward import DiNaLRMModule, GatedQFormerHead, ThurstoneLoss
from latentreward.reward.modules.reward import PairDraws
from tests.data.edit_names import named
from tests.diffusion.cache.test_datamodule import cached, fit
from tests.diffusion.cache.writing import stored, table, write_image
from tests.diffusion.cache.written_caches import write_cache
from tests.diffusion.families.twins import TWINS
from tests.marks import rotated_after

KLEIN = TWINS["klein_base"]
TEXTS = ("make it red", "remove the dog", "make it red", "add a cat")
SOURCES_OF = ((0, 1), (1, 2), (1, 0), (2, 2), (0, 1), (2, 1), (0, 2), (1, 0))
"""Numbers of the pictures that each pair's images are edits of."""


class Edits(PairReader):
    """Eight pairs with up to two sources, of three pictures.

    Args:
        root: Folder of the pictures.
        pictures: Number of sources of each pair; 3 gives every other pair one and the others two.
        on_error: See :class:`PairReader`.
    """

    def __init__(self, root: str, pictures: int = 1, on_error: OnError | None = None) -> None:
        super().__init__(on_error)
        self.root, self.pictures = Path(root), pictures

    def __len__(self) -> int:
        return len(SOURCES_OF)

    def __getitem__(self, index: int) -> PreferencePair:
        count = 1 + index % 2 if self.pictures == 3 else self.pictures
        sources = [self.ref(f"source {number}") for number in SOURCES_OF[index][:count]]
        images = self.ref(f"{index}a"), self.ref(f"{index}b")
        prompt = EditPrompt(TEXTS[index % len(TEXTS)], sources) if sources else TEXTS[index % len(TEXTS)]
        return PreferencePair(f"pair {index}", prompt, *images, label_a=float(index % 2))

    def ref(self, name: str) -> ImageRef:
        return ImageRef(name, path=self.root / f"{name}.jpg")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edits")
    names = [f"{number}{side}" for number in range(len(SOURCES_OF)) for side in "ab"]
    for number, name in enumerate([*names, *(f"source {number}" for number in range(3))]):
        write_image(folder / f"{name}.jpg", number, (48, 64 if "source" in name else 48))
    return folder


def arguments(output: Path, root: Path, *settings: str) -> list[str]:
    return [
        "cache",
        str(output),
        f"--reader={__name__}.Edits",
        f"--reader.root={root}",
        "--encoder=PipelineEncoders",
        f"--encoder.source={KLEIN.folder}",
        "--encoder.batch_size=4",
        "--images.size=32",
        "--images_per_shard=2",
        "--num_workers=0",
        "--dtype=float32",
        "--device=cpu",
        *settings,
    ]


SETTINGS = {
    "sample": ("--encoder.text=true", "--reader.pictures=2"),
    "mode": ("--encoder.text=true", "--encoder.posterior=mode"),
    "half": ("--encoder.text=true", "--encoder.posterior=mode", "--dtype=float16"),
    "uneven": ("--reader.pictures=3",),
}


@pytest.fixture(scope="module")
def written(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches that fast tests read."""
    folder = tmp_path_factory.mktemp("caches")
    for name in ("sample", "uneven"):
        main(arguments(folder / name, pictures, *SETTINGS[name]))
    return folder


@pytest.fixture(scope="module")
def trained_on(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches that slow tests train on."""
    folder = tmp_path_factory.mktemp("trained_on")
    for name in ("mode", "half"):
        main(arguments(folder / name, pictures, *SETTINGS[name]))
    return folder


@pytest.fixture(scope="module")
def vae() -> LatentEncoder:
    """The family's own VAE."""
    return find_family(KLEIN.source().pipeline()).load_latent_encoder()


def mode_of(vae: LatentEncoder, path: Path) -> Tensor:
    """Latents ``(C, h, w)`` of a picture, without noise."""
    return vae.encode(PixelLoader(32, 32, "center_crop")(ImageRef(path.stem, path=path))[None])[0]


def check_sources_of(cache: Path, count: int, vae: LatentEncoder, pictures: Path) -> None:
    """Each of three sources is there once, as the posterior's mode; pairs have ``count`` of them."""
    images = table(cache, IMAGES)
    keys = [image["image_key"] for image in images]
    assert len(keys) == len(set(keys)) == 16 + 3 == read_plan(cache).images
    for row, pair in enumerate(table(cache, PAIRS)):
        assert [keys[number] for number in pair["source_images"]] == [f"source {n}" for n in SOURCES_OF[row][:count]]
    for image, found in zip(images, stored(cache), strict=True):
        if image["image_key"].startswith("source"):
            assert image["side"] in "01"
            expected = mode_of(vae, pictures / f"{image['image_key']}.jpg")
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_source_is_encoded_once_to_the_mode(written: Path, vae: LatentEncoder, pictures: Path) -> None:
    check_sources_of(written / "sample", 2, vae, pictures)


def test_a_text_is_encoded_once_whatever_its_pictures(written: Path) -> None:
    assert [row["prompt"] for row in table(written / "sample", PROMPTS)] == ["", *dict.fromkeys(TEXTS)]


def test_batches_hold_sources_place_by_place(written: Path, vae: LatentEncoder, pictures: Path) -> None:
    reader, index = Edits(str(pictures), 2), CacheIndex(written / "sample")
    pairs = CachedPairs(index)
    assert pairs.prompts() == [pairs[number].prompt for number in range(len(pairs))]
    assert named(pairs.prompts()) == named(reader.prompts())
    batch = CachedPairDataset(index, pairs.rows).__getitems__([4, 0, 3])
    assert named(batch.prompts) == named(reader[row].prompt for row in (4, 0, 3))
    assert [len(sources_of(prompt)) for prompt in batch.prompts] == [2, 2, 2]
    assert [one.shape for one in batch.sources] == [batch.chosen.shape] * 2
    for place, latents in enumerate(batch.sources):
        for found, row in zip(latents, (4, 0, 3), strict=True):
            expected = mode_of(vae, pictures / f"source {SOURCES_OF[row][place]}.jpg")
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not batch.conditioning.source_latents and len(batch.uncond) == 1


@pytest.mark.parametrize("workers", rotated_after(1, [0, 1]))
def test_a_batch_has_one_number_of_sources(workers: int, written: Path) -> None:
    data = cached(written / "uneven", batch_size=3, num_workers=workers, prefetch_factor=1 if workers else 4)
    seen = list(data.train_dataloader())
    assert sorted(pair for batch in seen for pair in batch.pair_ids) == [f"pair {number}" for number in range(8)]
    for batch in seen:
        assert {len(sources_of(prompt)) for prompt in batch.prompts} == {len(batch.sources)}
        assert {1 + int(pair.split()[1]) % 2 for pair in batch.pair_ids} == {len(batch.sources)}


def reward() -> DiNaLRMModule:
    torch.manual_seed(0)
    backbone = create_backbone("flux2_klein", source=KLEIN.folder, num_layers=3, visual_taps=[2, 3], text_taps=[2])
    return DiNaLRMModule(backbone, GatedQFormerHead, ThurstoneLoss(), eval_sigmas=[0.5], posterior="mode", seed=0)


def policy() -> DiffusionDPOModule:
    return DiffusionDPOModule(KLEIN.source(), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "options", "tolerance"),
    rotated_after(
        1,
        [
            (reward, "mode", {}, 1e-5),
            (policy, "mode", {}, 1e-4),
            (reward, "mode", {"cached_text": False, "num_workers": 1}, 1e-5),
            (reward, "half", {}, 2e-3),
        ],
    ),
)
def test_training_from_the_cache_gives_the_losses_of_training_from_pictures(
    module: Any, name: str, options: dict[str, Any], tolerance: float, trained_on: Path, pictures: Path
) -> None:
    settings = {"batch_size": 4, "num_workers": 0, "seed": 0}
    data = (
        PreferenceDataModule(32, resize="center_crop", train=Edits(str(pictures)), **settings),
        cached(trained_on / name, **{**settings, **options}),
    )
    wanted, got = (fit(module(), one, max_epochs=1) for one in data)
    assert got.pairs == wanted.pairs and len(got.values) == 2
    if module is reward:  # a policy draws the posterior of pixels anew, and the cache holds its mode
        losses = torch.tensor(got.values), torch.tensor(wanted.values)
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    # The tiny network's losses hardly depend on the sources.
    learner, batches = module(), [next(iter(one.train_dataloader())) for one in data]
    found = [learner.encode(batch, PairDraws(batch, 0, 0)).conditioning.source_latents for batch in batches]
    assert [len(latents) for latents in found] == [1, 1]
    torch.testing.assert_close(found[1], found[0], rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("pictures_of_pair", [1, 2])
def test_a_network_that_edits_nothing_is_refused_before_its_weights_are_read(
    pictures_of_pair: int, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(TWINS["flux1_dev"].folder, tmp_path / "flux", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = (f"--reader.pictures={pictures_of_pair}", f"--encoder.source={tmp_path / 'flux'}")
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "cache", pictures, *settings))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"reader: FLUX.1 makes pictures from text alone, and {pictures_of_pair} to edit were given" in error
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("counts", "takes", "message"),
    [
        ((1, 1), (0, 0), "have 1 sources, but the model's network takes 0;"),
        ((1, 2), (0, 1), "have 2 sources, but the model's network takes 0 to 1;"),
        ((0, 0), (1, None), "have 0 sources, but the model's network takes at least 1;"),
        ((1, 2), (1, None), None),
    ],
)
def test_a_network_must_take_the_cache_s_numbers_of_sources(
    counts: tuple[int, ...],
    takes: tuple[int, int | None],
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("latentreward.diffusion.cache.datamodule.check_backbone", lambda *given: None)
    network = SimpleNamespace(sources=takes, text_encoder=None)
    pairs = [{"image_a": 0, "image_b": 1, "source_images": [2] * count} for count in counts]
    data = cached(write_cache(tmp_path / "cache", pairs, [(16, 16)] * 3))
    with nullcontext() if message is None else pytest.raises(InputError, match=message):
        data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(policy=network))  # type: ignore[assignment]
        data.setup("fit")
