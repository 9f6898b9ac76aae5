"""A user's own module and data, of a few milliseconds, for runs of the command line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader

from latentreward.apps.cli import main
from latentreward.data import PairBatchSampler
from latentreward.data.loading import ResumableLoader
from latentreward.reward.modules.training import OptimizerSteps, single_optimizer

ROWS = 24
SEEN: list[list[int]] = []
"""Rows of each training batch of the last run."""
RUNS: list["SmallUserModule"] = []
"""The module of each run, with its trainer."""


class SmallUserModule(LightningModule):
    """A net that remembers the rows it saw."""

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        width: int = 3,
        spoil_at: int | None = None,
        value: str = "nan",
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
        self.table = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(1))
        self.optimizer, self.lr_scheduler, self.spoil_at, self.value = optimizer, lr_scheduler, spoil_at, value
        SEEN.clear()
        RUNS.append(self)

    def training_step(self, rows: Tensor, index: int) -> Tensor:
        SEEN.append(rows.tolist())
        return (self.net(self.table[rows]) - self.table[rows].sum(1, keepdim=True)).square().mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.global_step + 1 == self.spoil_at:  # Lightning counts the step later
            self.net[2].weight.data[0, 1] = float(self.value)

    def validation_step(self, rows: Tensor, index: int) -> None:
        self.log("val/loss", self.net(self.table[rows]).mean())

    test_step = validation_step

    def predict_step(self, rows: Tensor, index: int) -> Tensor:
        return self.net(self.table[rows])

    def configure_optimizers(self) -> Any:
        return single_optimizer(self.parameters(), self.optimizer, self.lr_scheduler)


class SteppedUserModule(SmallUserModule):
    """The same with the steps, schedules and learning rate finder of this package's modules."""

    lr: float | None = None
    configured_lr: float | None = None

    def configure_optimizers(self) -> Any:
        self.configured_lr = self.lr
        return single_optimizer(self.parameters(), self.optimizer, self.lr_scheduler, lr=self.lr)

    def configure_callbacks(self) -> list[Callback]:
        return [OptimizerSteps()]


class SmallUserData(LightningDataModule):
    """Row numbers."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = PairBatchSampler(ROWS, self.batch_size, seed=3)
        return ResumableLoader(list(range(ROWS)), sampler, collate_fn=torch.tensor)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(4), batch_size=2)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


def run(command: str, folder: Path, *settings: str) -> SmallUserModule:
    """Run a subcommand with these classes in ``folder``; returns its module."""
    main(
        [
            command,
            "--model=tests.small_user.SmallUserModule",
            "--data=tests.small_user.SmallUserData",
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={folder}",
            "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={folder}",
            "--trainer.logger.name=run",
            "--trainer.logger.version=",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *settings,
        ]
    )
    return RUNS[-1]


def refusal(capsys: pytest.CaptureFixture[str], command: str, folder: Path, *settings: str) -> str:
    """The one line that a run ends with, whose status is 2."""
    with pytest.raises(SystemExit) as stop:
        run(command, folder, *settings)
    assert stop.value.code == 2
    sys.stdout.flush()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("latentreward: error: ")
    return line.removeprefix("latentreward: error: ")
