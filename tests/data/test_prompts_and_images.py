"""Prompts beside images: what a batch is, how long an epoch, and resume in its middle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import ExactResume
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from latentreward.core.contracts import PreferenceBatch, PromptBatch
from latentreward.data import PairBatchSampler, PromptsAndImages, collate_pairs
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.data.loading import ResumableLoader
from tests.alignment.modules.batches import loaded_pairs


class Images(LightningDataModule):
    """Ten pairs, in another order each epoch."""

    torn_down = 0

    def teardown(self, stage: str) -> None:
        self.torn_down += 1

    def train_dataloader(self) -> ResumableLoader:
        places = PairBatchSampler(10, batch_size=2, seed=0)
        return ResumableLoader(loaded_pairs(10), places, collate_fn=collate_pairs)


class Seeing(LightningModule):
    """Notes what it is given; stops with an error at a step."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight, self.fail_at, self.seen = torch.nn.Parameter(torch.zeros(1)), fail_at, []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        prompts, images = batch["prompts"], batch["images"]
        assert isinstance(prompts, PromptBatch)
        assert isinstance(images, PreferenceBatch)
        self.seen.append((prompts.keys, images.pair_ids))
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAfter(Callback):
    """Saves a checkpoint after the batch of this index, and ends the run."""

    def __init__(self, index: int, path: Path) -> None:
        self.index, self.path = index, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.index:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise KeyboardInterrupt


def data(batches_per_epoch: int) -> PromptsAndImages:
    prompts = PromptLoaders(
        [f"prompt {i}" for i in range(7)], batch_size=3, batches_per_epoch=batches_per_epoch, seed=0
    )
    return PromptsAndImages(prompts, Images())


def fit(module: Seeing, batches_per_epoch: int, folder: Path, checkpoint: Path | None = None) -> list[Any]:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    both = data(batches_per_epoch)
    trainer.fit(module, both, ckpt_path=checkpoint)
    assert both.images.torn_down == 1  # type: ignore[attr-defined]  # where unreadable images are counted
    return module.seen


@pytest.mark.parametrize(("batches_per_epoch", "expected"), [(4, 8), (9, 10)])
def test_an_epoch_is_as_long_as_the_shorter_part(batches_per_epoch: int, expected: int, tmp_path: Path) -> None:
    seen = fit(Seeing(), batches_per_epoch, tmp_path)
    assert len(seen) == expected
    keys = [key for keys, _ in seen for key in keys]
    assert len(set(keys)) == len(keys)
    first = [pair for _, pairs in seen[: expected // 2] for pair in pairs]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("stopped", [2, 4, 5])
def test_resume_goes_on_with_both(stopped: int, tmp_path: Path) -> None:
    whole = fit(Seeing(), 4, tmp_path / "whole")
    with pytest.raises(SystemExit):
        fit(Seeing(fail_at=stopped), 4, tmp_path / "broken")
    rest = fit(Seeing(), 4, tmp_path / "rest", tmp_path / "broken" / f"step={stopped}.ckpt")
    assert rest == whole[stopped:]


def test_batches_since_the_last_optimiser_step_are_repeated(tmp_path: Path) -> None:
    """Their gradients are in no checkpoint."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def run(module: Seeing, *more: Callback, path: Path | None = None) -> list[Any]:
        callbacks = [ExactResume(), *more]
        trainer = Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, callbacks=callbacks, **quiet)
        trainer.fit(module, data(4), ckpt_path=path, weights_only=True)
        return module.seen

    whole, path = run(Seeing()), tmp_path / "third.ckpt"
    with pytest.raises(SystemExit):
        run(Seeing(), SaveAfter(2, path))
    assert run(Seeing(), path=path) == whole[2:]
