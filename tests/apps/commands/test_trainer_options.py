"""Options of Lightning's trainer and schedules of PyTorch: what works from the command line, and what is one line."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.small_user import RUNS, SEEN, SteppedUserModule, refusal, run

ONE_CYCLE = ("--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr=0.01")
LAST = "--trainer.callbacks+=LastCheckpoint"


def cycle(steps: int, total: int) -> tuple[str, ...]:
    return (*ONE_CYCLE, f"--model.lr_scheduler.total_steps={total}", f"--trainer.max_steps={steps}", LAST)


@pytest.mark.slow
def test_one_cycle_shorter_than_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = "model.lr_scheduler: OneCycleLR ends at total_steps=4, before the run's 6 optimiser steps; give --model.lr_"
    assert refusal(capsys, "fit", tmp_path, *cycle(6, 4)).startswith(short)
    assert not SEEN
    run("fit", tmp_path, *cycle(4, 4))
    assert refusal(capsys, "fit", tmp_path, *cycle(6, 6), "--ckpt_path=last").endswith("--resume_override=[lr]")


@pytest.mark.slow
@pytest.mark.parametrize("before", [cycle(4, 4), ("--trainer.max_steps=4", LAST)])
def test_one_cycle_replaces_a_schedule(before: tuple[str, ...], tmp_path: Path) -> None:
    run("fit", tmp_path, *before)
    run("fit", tmp_path, *cycle(6, 9), "--ckpt_path=last", "--resume_override=[lr]")
    resumed = RUNS[-1].optimizers().param_groups[0]
    run("fit", tmp_path / "straight", *cycle(6, 9))
    straight = RUNS[-1].optimizers().param_groups[0]
    for name in ("lr", "betas", "max_lr", "initial_lr"):
        assert resumed[name] == pytest.approx(straight[name]), name


class Based(SteppedUserModule):
    """A module with schedules of this package, whose metric rises at each validation."""

    def validation_step(self, rows: Tensor, index: int) -> None:
        self.log("val/loss", float(self.global_step))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("--trainer.val_check_interval=50",), "`val_check_interval` (50)"),
    ],
)
def test_refusals(settings: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "fit", tmp_path, "--trainer.max_epochs=2", *settings).startswith(said)


class NoLoss(Based):
    """A module whose step forgets to return the loss."""

    def training_step(self, rows: Tensor, index: int) -> Tensor:
        super().training_step(rows, index)
        return None  # type: ignore[return-value]


class Detached(Based):
    """A module whose loss has lost its gradient."""

    def training_step(self, rows: Tensor, index: int) -> Tensor:
        return super().training_step(rows, index).detach()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NoLoss, "NoLoss.training_step returned None; it must return the loss"),
        (Detached, "Detached.training_step returned a loss without a gradient; nothing that is computed"),
    ],
)
def test_a_step_without_a_loss_is_one_line(
    kind: type, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (f"--model={__name__}.{kind.__name__}", "--trainer.max_steps=1")
    assert refusal(capsys, "fit", tmp_path, *options).startswith(message)
