"""A run of a few milliseconds with all that a resume has to get right: dropout, schedule, average, validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from latentreward.callbacks import ExactResume, GracefulStop, TrainableEMA
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from latentreward.data import PairBatchSampler
from latentreward.data.loading import ResumableLoader, WorkerLoader

ROWS = 26


class SmallModule(LightningModule):
    """A net with dropout that remembers the rows it saw, and validates on its own weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.table = torch.randn(ROWS, 4)
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[tuple[int, int]] = []

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, rows.tolist()))
        return self.net(self.table[rows]).square().mean()

    def validation_step(self, rows: Tensor, batch_idx: int) -> None:
        self.validated.append((self.global_step, batch_idx))
        self.log("val/loss", self.net(self.table[rows]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_loader(batch_size: int = 4, workers: int = 0) -> ResumableLoader:
    sampler = PairBatchSampler(ROWS, batch_size, seed=3)
    return ResumableLoader(list(range(ROWS)), sampler, collate_fn=torch.tensor, num_workers=workers)  # type: ignore[arg-type]


def make_trainer(
    folder: Path, callbacks: Sequence[Callback] = (), stop: GracefulStop | None = None, **options: Any
) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": bool(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    own = [stop or GracefulStop(), ExactResume(seed=5), TrainableEMA(0.9)]
    return Trainer(callbacks=[*own, *callbacks], **{**settings, **options})


def fit(trainer: Trainer, checkpoint: Path | None = None, batch_size: int = 4, workers: int = 0) -> SmallModule:
    module = SmallModule()
    validation = WorkerLoader(range(6), batch_size=2, num_workers=workers, persistent_workers=workers > 0)  # type: ignore[arg-type]
    trainer.fit(module, train_loader(batch_size, workers), validation, ckpt_path=checkpoint)
    return module


def state(trainer: Trainer) -> list[Tensor]:
    """Weights, their average, and the optimiser's moments."""
    (average,) = (callback.average for callback in trainer.callbacks if isinstance(callback, TrainableEMA))
    moments = [value for slot in trainer.optimizers[0].state.values() for value in slot.values()]
    rate = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
    return [*trainer.lightning_module.state_dict().values(), *average.values(), *moments, rate]


def assert_same_state(first: Trainer, second: Trainer) -> None:
    assert first.global_step == second.global_step
    for one, other in zip(state(first), state(second), strict=True):
        assert torch.equal(one, other)
