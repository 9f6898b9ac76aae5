"""Seconds by phase of a run's steps: parts that add up, equal results."""

import csv
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import Performance, performance
from latentreward.callbacks.performance import StepTimes, phase_of
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler

from latentreward.core.running import LISTENER, PHASES, phase
from tests.callbacks.small_run import fit, make_trainer, state


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> StepTimes:
    """Times of a clock that goes on by a second each time that it is read."""
    ticks = count()
    monkeypatch.setattr(performance, "perf_counter", lambda: next(ticks))
    return StepTimes(cuda=False)


def test_the_innermost_phase_counts_and_all_together_are_the_step(times: StepTimes) -> None:
    times.begin("forward")  # mark 1
    times.begin("encode")  # 2
    times.end()  # 3, forward goes on
    times.begin("forward")  # no change, no mark
    times.end()
    times.pause(True)  # 4: a validation
    times.begin("backward")
    times.end()
    times.pause(False)  # 5
    times.end()  # 6, log
    times.end_step()  # 7
    times.begin("backward")  # of the next step, which has not ended
    times.read()
    assert times.seconds == {"log": 1 + 1, "forward": 1 + 1 + 1, "encode": 1}
    assert times.steps == 1
    values = times.values()
    assert values["time/step"] == sum(value for name, value in values.items() if name != "time/step" and "time" in name)
    times.restart()
    times.end()
    times.end_step()
    times.end_step()
    times.read()
    assert (times.steps, times.seconds) == (2, {"log": 3, "backward": 1})
    assert times.values()["time/log"] == 1.5


class Event:
    """Event of a card that has come as far as ``passed``; each record is 100 ms after the one before."""

    recorded = passed = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.place = Event.recorded

    def query(self) -> bool:
        return self.place <= Event.passed

    def elapsed_time(self, later: "Event") -> float:
        assert self.query() and later.query(), "reading would wait for the card"
        return 100.0 * (later.place - self.place)


def test_events_of_a_card_are_read_when_it_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "recorded", 0)
    times = StepTimes(cuda=True)  # event 1
    for _ in range(2):  # events 2, 3, 4 and 5, 6, 7
        times.begin("forward")
        times.end()
        times.end_step()
    for passed, steps, forward in ((0, 0, 0.0), (3, 0, 0.0), (6, 1, 0.1), (7, 2, 0.2)):
        monkeypatch.setattr(Event, "passed", passed)
        times.read()
        assert (times.steps, times.seconds["forward"]) == (steps, pytest.approx(forward))
    assert sum(times.seconds.values()) == pytest.approx(0.6)


def test_a_worker_that_was_forked_begins_no_phase(times: StepTimes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "pid", -1)
    LISTENER.set(times)
    try:
        with phase("encode"):
            assert times.open == ["log"]
    finally:
        LISTENER.set(None)


@pytest.mark.parametrize(
    ("action", "name"),
    [
        ("[_TrainingEpochLoop].train_dataloader_next", "data_wait"),
        ("[Strategy]DDPStrategy.batch_to_device", "data_wait"),
        ("[Strategy]DDPStrategy.training_step", "forward"),
        ("[Strategy]DDPStrategy.backward", "backward"),
        ("[LightningModule]LPOModule.optimizer_step", "optimizer"),
        ("[Callback]TrainableEMA.on_train_batch_end", "ema"),
        ("[Callback]ModelCheckpoint{'monitor': 'val/accuracy'}.on_train_batch_end", "log"),
        ("save_checkpoint", "aside"),
        ("run_training_batch", None),
        ("[LightningModule]LPOModule.on_train_batch_start", None),
    ],
)
def test_phases_of_lightnings_actions(action: str, name: str | None) -> None:
    assert phase_of(action) == name


def logged(folder: Path) -> list[dict[str, float]]:
    (file,) = folder.rglob("metrics.csv")
    rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file.open())]
    return [row for row in rows if "time/step" in row]


def test_a_run_logs_every_so_many_steps_and_computes_the_same(tmp_path: Path) -> None:
    profiler = SimpleProfiler()
    logger = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 4, "profiler": profiler, "val_check_interval": 3}
    measured = make_trainer(tmp_path, [Performance()], **logger)
    fit(measured)
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [3, 7, 11]
    for row in rows:
        assert set(row) == {"step", "epoch", "time/step"} | {
            f"time/{name}" for name in ("data_wait", "forward", "backward", "optimizer", "ema", "log")
        }
        assert row["time/step"] == pytest.approx(sum(row.get(f"time/{name}", 0.0) for name in PHASES), rel=1e-5)
    assert LISTENER.get() is None
    assert "start" not in vars(profiler)
    assert profiler.recorded_durations["run_training_batch"]
    plain = make_trainer(tmp_path / "plain", [Performance()], val_check_interval=3, log_every_n_steps=0)
    plain.callbacks = [one for one in plain.callbacks if not isinstance(one, Performance)]
    fit(plain)
    assert all(map(torch.equal, state(measured), state(plain)))


def test_the_measurement_ends_with_an_error(tmp_path: Path) -> None:
    class Failing(Performance):
        def on_before_zero_grad(self, *_: Any) -> None:
            raise RuntimeError("stop")

    trainer = make_trainer(tmp_path, [Failing()], logger=CSVLogger(tmp_path))
    with pytest.raises(RuntimeError, match="stop"):
        fit(trainer)
    assert LISTENER.get() is None
    assert "start" not in vars(trainer.profiler)
