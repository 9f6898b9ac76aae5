"""Training from a cache: the same as from images, checked before it starts, dealt out to ranks by our samplers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import EncodeOnce, ExactResume, TrainableCheckpoint
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from latentreward.alignment import DiffusionDPOModule, PolicySource
from latentreward.apps.cli import main
from latentreward.core.contracts import PreferenceBatch
from latentreward.core.errors import InputError
from latentreward.data import HPDv3Reader, PreferenceDataModule
from latentreward.diffusion import CachedPreferenceDataModule, CachedSplit, sd35_tiny, sd_tiny
from latentreward.reward import (
    CLIPProjectionHead,
    DiNaLRMModule,
    GatedQFormerHead,
    LRMLoss,
    LRMModule,
    ThurstoneLoss,
)
from latentreward.tinyworld.writers import write_hpdv3
from tests.diffusion.cache.written_caches import spec, write_cache
from tests.distributed.ranks import on_ranks
from tests.marks import rotated_after

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Losses(Callback):
    """Every training loss, and the pairs that gave it."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.pairs: list[tuple[str, ...]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: PreferenceBatch, _: int) -> None:
        self.values.append(float(outputs["loss"]))
        self.pairs.append(batch.pair_ids)


def cache_world(output: Path, data: Path, *settings: str) -> Path:
    """Cache the tiny world's pairs at ``data`` as the shipped YAML says, with the mode of the posterior."""
    common = [f"--config={CONFIGS}/cache/tinyworld.yaml", f"--reader.root={data}", "--encoder.posterior=mode"]
    main(["cache", str(output), *common, *settings])
    return output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the tiny world, and their caches."""
    folder = tmp_path_factory.mktemp("world")
    write_hpdv3(folder / "hpdv3", {"train": 20, "test": 12})
    cache_world(folder / "train", folder / "hpdv3")
    cache_world(folder / "test", folder / "hpdv3", "--reader.split=test")
    cache_world(folder / "half", folder / "hpdv3", "--dtype=float16")
    cache_world(folder / "sd", folder / "hpdv3", "--encoder.source=sd_tiny", "--encoder.t5_length=256")
    return folder


def dina() -> DiNaLRMModule:
    return DiNaLRMModule(sd35_tiny(), GatedQFormerHead, ThurstoneLoss(), eval_sigmas=[0.5], posterior="mode", seed=0)


def lrm() -> LRMModule:
    return LRMModule(sd_tiny(), CLIPProjectionHead, LRMLoss(), eval_timesteps=[1], posterior="mode", seed=0)


def fit(module: Any, data: LightningDataModule, **options: Any) -> Losses:
    losses = Losses()
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, **QUIET, **options}
    Trainer(accelerator="cpu", callbacks=[losses], **settings).fit(module, data)
    return losses


def pixels(world: Path) -> PreferenceDataModule:
    train = HPDv3Reader(str(world / "hpdv3"), "train")
    return PreferenceDataModule(32, train=train, batch_size=8, num_workers=0, seed=0)


def cached(folder: Path, **options: Any) -> CachedPreferenceDataModule:
    settings = {"batch_size": 8, "num_workers": 0, "seed": 0, **options}
    return CachedPreferenceDataModule(train=CachedSplit(str(folder)), **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "options", "tolerance"),
    rotated_after(
        1, [("train", {}, 1e-5), ("train", {"cached_text": False, "num_workers": 1}, 1e-5), ("half", {}, 2e-3)]
    ),
    ids=["with text", "latents only, one worker", "float16"],
)
def test_training_from_the_cache_gives_the_losses_of_training_from_images(
    world: Path, folder: str, options: dict[str, Any], tolerance: float
) -> None:
    seed_everything(0, verbose=False)
    wanted = fit(dina(), pixels(world))
    seed_everything(0, verbose=False)
    got = fit(dina(), cached(world / folder, **options))
    assert got.pairs == wanted.pairs
    assert len(got.values) == 6
    torch.testing.assert_close(torch.tensor(got.values), torch.tensor(wanted.values), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lrm", "dina"])
def test_text_encoders_are_freed_where_prompts_are_cached(method: str, world: Path, tmp_path: Path) -> None:
    def reward() -> DiNaLRMModule | LRMModule:
        seed_everything(0)
        module = dina() if method == "dina" else lrm()
        module.model.backbone.text_encoder.requires_grad_(False)
        return module

    modules = []
    for once in ([], [EncodeOnce()]):
        module = reward()
        data = cached(world / ("train" if method == "dina" else "sd"))
        trainer = Trainer(
            accelerator="cpu", max_steps=3, callbacks=[TrainableCheckpoint(), *once], **QUIET, num_sanity_val_steps=0
        )
        trainer.fit(module, datamodule=data)
        modules.append(module)
    whole, freed = (module.model.state_dict() for module in modules)
    assert freed.keys() == {name for name in whole if not name.startswith("backbone.text_encoder.")} < whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in freed.items())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    reward().on_load_checkpoint(content := torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert any(name.startswith("model.backbone.text_encoder.") for name in content["base"]["names"])
    with pytest.raises(InputError, match=r"'a purple cow' was not encoded .*; use cached prompts, or"):
        modules[1].model.encode_prompts(["a purple cow"])
    with pytest.raises(InputError, match="EncodeOnce has freed the model's text encoders; load a checkpoint of"):
        modules[1].model.save_pretrained(tmp_path / "folder")


def dpo() -> DiffusionDPOModule:
    return DiffusionDPOModule(PolicySource("sd35_tiny"), seed=0)


@pytest.mark.slow
def test_a_policy_learns_from_the_cache_the_pairs_of_the_images(world: Path) -> None:
    """Losses differ: of pixels Diffusion-DPO draws the VAE's posterior anew, and the cache holds its mode."""
    wanted, got = fit(dpo(), pixels(world), max_steps=3), fit(dpo(), cached(world / "train"), max_steps=3)
    assert got.pairs == wanted.pairs
    assert torch.tensor(got.values).isfinite().all()


def test_another_vae_and_another_text_encoder_of_the_same_shape_are_refused(world: Path) -> None:
    module = dina()
    with torch.no_grad():
        next(module.model.backbone.vae.vae.encoder.parameters()).mul_(1.5)
    with pytest.raises(InputError, match="the cache was written with VAE"):
        fit(module, cached(world / "train"))
    module = dina()
    with torch.no_grad():
        next(module.model.backbone.text_encoder.parameters()).mul_(1.5)
    with pytest.raises(InputError, match="the cache holds embeddings of text encoder"):
        fit(module, cached(world / "train"))
    fit(module, cached(world / "train", cached_text=False), max_steps=1)


def test_splits_of_one_cache_share_no_prompt_and_only_prediction_sees_unlabelled_pairs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [
        {"image_a": 0, "image_b": 1, "prompt": 1, "split": "train"},
        {"image_a": 2, "image_b": 3, "prompt": 2, "split": "train"},
        {"image_a": 2, "image_b": 1, "prompt": 2, "split": "train", "label_a": None},
        {"image_a": 4, "image_b": 5, "prompt": 1, "split": "val"},
        {"image_a": 4, "image_b": 0, "prompt": 1, "split": "val", "label_a": None},
        {"image_a": 4, "image_b": 6, "prompt": 1, "split": "val"},
    ]
    folder = write_cache(tmp_path / "cache", pairs, [(16, 16)] * 7, unread=[6])
    parts = {name: CachedSplit(str(folder), split) for name, split in (("train", "train"), ("val", "val"))}
    data = CachedPreferenceDataModule(**parts, predict=CachedSplit(str(folder)), batch_size=2, num_workers=0)
    seen = {
        name: [pair for batch in loader for pair in batch.pair_ids]
        for name, loader in {
            "train": data.train_dataloader(),
            "val": data.val_dataloader(),
            "predict": data.predict_dataloader(),
        }.items()
    }
    assert seen == {"train": ["pair01"], "val": ["pair03"], "predict": [f"pair{n:02d}" for n in range(5)]}
    assert "data.train: 1 of 3 rows have a prompt that val has too" in caplog.text
    assert "data.val: 2 rows kept; left out: 1 unreadable image" in caplog.text
    kept = CachedPreferenceDataModule(**parts, shared_prompts="keep", batch_size=2, num_workers=0)
    assert [len(kept.datasets[name]) for name in ("train", "val")] == [2, 1]


def test_splits_without_pairs_left_do_not_stop_the_others(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", [{"image_a": 0, "image_b": 1}], [(16, 16)] * 2)
    every = dict.fromkeys(("train", "val", "test", "predict"), CachedSplit(str(folder)))
    data = CachedPreferenceDataModule(**every, batch_size=2, num_workers=0)
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert [pair for batch in loader for pair in batch.pair_ids] == ["pair00"]
    for name, later in (("train", "val or test"), ("val", "test")):
        with pytest.raises(InputError, match=rf"data\.{name}: none of 1 rows left: .* have a prompt that {later} has"):
            getattr(data, f"{name}_dataloader")()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other VAE": ({"train": "one", "val": "other"}, "VAE"),
    "clips": ({"train": "one", "val": "clips"}, "images.f"),
    "slower": ({"train": "slow", "val": "clips"}, "images.f"),
    "no pairs": ({"train": "one", "batch_size": 0}, "data.batch_size"),
    "no split": ({"train": ("one", "test")}, "data.train"),
    "unset": ({}, "data.train"),
    "no cache": ({"train": "absent"}, "data.train"),
    "no test": ({"test": "absent"}, "data.test"),
    "no test to keep apart from": ({"train": "one", "test": "absent", "shared_prompts": "raise"}, "data.test"),
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    specs = {"one": spec(), "other": spec(vae="vae-2")}
    specs |= {
        name: spec(images={"size": 16, "frames": 5, "fps": fps}) for name, fps in (("clips", 16.0), ("slow", 8.0))
    }
    for name, one in specs.items():
        write_cache(folder / name, [{"image_a": 0, "image_b": 1}], [(16, 16)] * 2, spec=one)
    return folder


def split_of(caches: Path, name: str | tuple[str, str]) -> CachedSplit:
    folder, split = (name, None) if isinstance(name, str) else name
    return CachedSplit(str(caches / folder), split)


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_and_caches_are_looked_at_in_the_constructor(kind: str, caches: Path) -> None:
    given, key = REFUSED[kind]
    options = {name: split_of(caches, one) if name in ("train", "val", "test") else one for name, one in given.items()}
    with pytest.raises(InputError) as error:
        CachedPreferenceDataModule(**options)
    assert key in str(error.value) and "\n" not in str(error.value)


def test_training_goes_on_without_the_cache_that_it_is_only_kept_apart_from(
    caches: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = CachedPreferenceDataModule(train=split_of(caches, "one"), test=split_of(caches, "absent"), num_workers=0)
    assert list(data.datasets) == ["train"] and "data.test is not opened" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(world: Path, tmp_path: Path) -> None:
    def fit(keeper: ModelCheckpoint | None, checkpoint: Path | None = None) -> Trainer:
        callbacks = [ExactResume(seed=1), *([keeper] if keeper else [])]
        options = {"max_epochs": 2, **QUIET, "enable_checkpointing": keeper is not None}
        trainer = Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **options)
        split = CachedSplit(str(world / "train"))
        data = CachedPreferenceDataModule(train=split, batch_size=3, num_workers=1, seed=2)
        trainer.fit(dina(), data, ckpt_path=checkpoint, weights_only=True)
        return trainer

    whole = fit(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    for step in (2, whole.global_step // 2, whole.global_step // 2 + 1, whole.global_step - 1):
        resumed = fit(None, tmp_path / f"step={step}.ckpt")
        assert resumed.global_step == whole.global_step
        for name, value in resumed.lightning_module.state_dict().items():
            assert torch.equal(value, whole.lightning_module.state_dict()[name]), (step, name)


class PairsToFiles(Callback):
    """Writes which pairs each rank saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _write(self, stage: str, trainer: Trainer, batch: PreferenceBatch) -> None:
        with (self.folder / f"{stage}{trainer.global_rank}").open("a") as file:
            file.write(" ".join(batch.pair_ids) + "\n")

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._write("train", trainer, batch)

    def on_validation_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._write("val", trainer, batch)


def fit_on_two_ranks(folder: Path) -> int:
    """One rank; returns its number of pairs."""
    data, options = train_and_validate(folder / "world"), {"max_epochs": 1, "num_sanity_val_steps": 0, **QUIET}
    runner = Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[PairsToFiles(folder)], **options)
    runner.fit(dina(), data)
    return len(data.datasets["train"])


def train_and_validate(world: Path) -> CachedPreferenceDataModule:
    train, val = CachedSplit(str(world / "train")), CachedSplit(str(world / "test"))
    return CachedPreferenceDataModule(train=train, val=val, batch_size=4, num_workers=1)


@pytest.mark.slow
def test_two_processes_share_the_pairs_whatever_lightning_would_do(world: Path, tmp_path: Path) -> None:
    (tmp_path / "world").symlink_to(world)
    on_ranks("tests.diffusion.cache.test_datamodule:fit_on_two_ranks", tmp_path)
    data = train_and_validate(world)
    lines = {path.name: [line.split() for line in path.read_text().splitlines()] for path in tmp_path.glob("[tv]*[01]")}
    assert [len(batch) for batch in lines["train0"]] == [len(batch) for batch in lines["train1"]]
    for stage, dataset in (("train", data.datasets["train"]), ("val", data.datasets["val"])):
        seen = [pair for rank in "01" for batch in lines[f"{stage}{rank}"] for pair in batch]
        assert len(seen) == len(set(seen)) == len(dataset)
