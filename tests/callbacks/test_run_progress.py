"""Progress of a run: steps of the whole run, before and after a resume, whatever ends it."""

import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latentreward.callbacks import RunProgress
from latentreward.callbacks.run_progress import total_steps
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from latentreward.core.errors import InputError
from tests.callbacks.small_run import fit, make_trainer

LINE = re.compile(r"train (\d+/(?:\d+|\?)) steps .* (\S+) left")


class Totals(Callback):
    """What is expected as the run and each of its epochs begin."""

    def __init__(self) -> None:
        self.seen: list[int | None] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(total_steps(trainer))

    on_train_epoch_start = on_train_start


def lines(printed: str) -> list[str]:
    """Steps done and in all, of each line."""
    return [match[1] for match in LINE.finditer(printed)]


def run(folder: Path, checkpoint: Path | None = None, batch_size: int = 4, **options: Any) -> tuple[Trainer, set[Any]]:
    """A run of 7 batches an epoch, and the totals that it expected."""
    totals = Totals()
    callbacks = [*options.pop("callbacks", ()), RunProgress(every_s=1e-6), totals]
    trainer = make_trainer(folder, callbacks, **{"enable_progress_bar": True, **options})
    fit(trainer, checkpoint, batch_size)
    return trainer, {*totals.seen}


def test_a_run_tells_its_steps_from_the_first_to_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, max_epochs=2)
    printed = capsys.readouterr()
    assert lines(printed.err) == [*(f"{step}/14" for step in range(15)), "14/14"]
    assert "train 13/14 steps" in printed.err and ", epoch=1  " in printed.err
    assert printed.err.splitlines()[-1].endswith("00:00 left")
    assert "steps" not in printed.out


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": 50}, 14),
        ({"max_steps": 20, "max_epochs": -1}, 20),
        ({"accumulate_grad_batches": 2}, 8),
        ({"accumulate_grad_batches": 2, "max_steps": 3}, 3),
        ({"limit_train_batches": 3}, 6),
    ],
)
def test_the_total_is_where_the_run_ends(tmp_path: Path, options: dict[str, Any], total: int) -> None:
    trainer, totals = run(tmp_path, **options)
    assert (totals, trainer.global_step) == ({total}, total)


@pytest.mark.slow
def test_without_a_limit_in_steps_only_those_done_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run ends by its time."""
    trainer, totals = run(tmp_path, max_epochs=-1, max_time=timedelta(seconds=2), val_check_interval=1.0)
    printed = capsys.readouterr().err
    assert totals == {None}
    assert lines(printed)[0] == "0/?"
    assert f"train {trainer.global_step}/? steps" in printed.splitlines()[-1]


@pytest.mark.parametrize("written_at", [3, 7])
@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_resumed_run_begins_where_it_stood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: int, written_at: int
) -> None:
    kept = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=written_at, save_top_k=-1)
    run(tmp_path / "a", max_steps=written_at, callbacks=[kept])
    capsys.readouterr()
    trainer, totals = run(tmp_path / "b", tmp_path / f"step={written_at}.ckpt", batch_size, max_epochs=3)
    assert totals == {trainer.global_step}
    told = lines(capsys.readouterr().err)
    assert told[0] == f"{written_at}/{trainer.global_step}"
    assert told[-1] == f"{trainer.global_step}/{trainer.global_step}"


def test_a_total_that_changes_with_accumulation_is_right_in_the_end(tmp_path: Path) -> None:
    trainer, totals = run(tmp_path, callbacks=[GradientAccumulationScheduler({0: 1, 1: 7})])
    assert trainer.global_step == 8
    assert 8 in totals


def test_a_long_validation_has_lines_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, max_epochs=1, num_sanity_val_steps=2)
    told = re.findall(r"^(sanity check|validation) (\d/\d) batches", capsys.readouterr().err, re.MULTILINE)
    assert {*told} == {("sanity check", "1/2"), ("sanity check", "2/2")} | {("validation", f"{n}/3") for n in (1, 2, 3)}


def test_other_ranks_and_bad_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress: Any = RunProgress()
    progress.setup(SimpleNamespace(is_global_zero=False), None, "fit")
    assert not progress.is_enabled
    progress.on_train_start(None, None)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="every_s=0"):
        RunProgress(every_s=0)
