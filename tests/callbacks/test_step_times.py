"""Seconds by phase, operations and MFU of a run's steps: parts that add up, counts that are exact, equal results."""

import csv
from itertools import count
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import Performance, step_times
from latentreward.callbacks.step_times import StepTimes, phase_of
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from latentreward.apps.cli import main
from latentreward.core.contracts import layout_of
from latentreward.core.errors import InputError
from latentreward.core.peak_rates import CountedFlops, find_limits
from latentreward.core.running import LISTENER, PHASES, phase
from tests.callbacks.small_run import fit, make_trainer, state
from tests.callbacks.test_performance import QUICK, RUNS
from tests.marks import rotated_after


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> StepTimes:
    """Times of a clock that goes on by a second each time that it is read."""
    ticks = count()
    monkeypatch.setattr(step_times, "perf_counter", lambda: next(ticks))
    return StepTimes(cuda=False, peak_tflops=2e-12)


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


def test_an_action_that_began_before_the_measurement_ends_nothing(times: StepTimes) -> None:
    times.end()
    assert times.open == ["log"]


def test_batches_of_a_layout_and_rollouts_are_counted_now_and_then(times: StepTimes) -> None:
    """The first, second and fourth are counted; the third takes the mean of the first two."""
    network = nn.Linear(3, 5, bias=False)
    for number in (1, 2, 3, 4):
        rows = torch.zeros(2 * number, 3)
        times.start_counting("batch")
        network(rows)
        times.stop_counting()
    times.end_step()
    times.begin("data_wait")
    times.begin("rollout")
    times.begin("reward")
    network(torch.zeros(7, 3))
    times.end()
    times.end()
    network(torch.zeros(7, 3))  # a worker's, say
    times.end()
    times.end_step()
    times.read()
    assert times.flops == 2 * 3 * 5 * (2 + 4 + 3 + 8 + 7)
    total = sum(times.seconds.values())
    assert times.values()["train/tflops_per_second"] == times.flops / total / 1e12
    assert times.values()["train/mfu"] == pytest.approx(times.flops / total / 2)


def step(network: nn.Module, rows: int) -> float:
    with CountedFlops() as counted:
        network(torch.ones(rows, 4)).sum().backward()
    return counted.flops


def test_of_very_many_layouts_some_are_not_counted(times: StepTimes) -> None:
    network = nn.Linear(3, 5, bias=False)
    for layout in range(64):
        times.start_counting((layout,))
        network(torch.zeros(2, 3))
        times.stop_counting()
    times.end_step()
    times.read()
    assert times.flops == 64 * 2 * 3 * 5 * 2
    assert sum(counted for _, counted, _ in times._counts.values()) <= 8 + 64 / 16 + 1


def test_a_worker_that_was_forked_begins_no_phase(times: StepTimes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "pid", -1)
    LISTENER.set(times)
    try:
        with phase("encode"):
            assert times.open == ["log"]
    finally:
        LISTENER.set(None)


def test_what_callbacks_compute_is_no_part_of_a_step() -> None:
    profiler, times = SimpleProfiler(), StepTimes(cuda=False)
    step_times.listen(profiler, times)
    try:
        times.start_counting("batch")
        profiler.start("run_training_batch")
        nn.Linear(3, 5, bias=False)(torch.zeros(2, 3))
        profiler.stop("run_training_batch")
        nn.Linear(30, 50)(torch.zeros(2, 30))  # a monitor's
        times.stop_counting()
    finally:
        step_times.unlisten(profiler)
    times.end_step()
    times.read()
    assert times.flops == 2 * 3 * 5 * 2


def test_a_formula_of_pytorch_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> int:
        raise ValueError("unknown shape")

    monkeypatch.setitem(flop_registry, torch.ops.aten.addmm, fails)
    assert isnan(step(nn.Linear(4, 2), 3))


def test_operations_of_a_matrix_product() -> None:
    """2·m·n·k forward and for the weight's gradient; the input of the first layer needs none."""
    network = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 1))
    assert step(network, 3) == 2 * (2 * 3 * 4 * 6) + 3 * (2 * 3 * 6 * 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_does_not_count(reentrant: bool) -> None:
    first, second = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 1))

    class Checkpointed(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return checkpoint(second, first(inputs), use_reentrant=reentrant)

    assert step(Checkpointed(), 3) == step(nn.Sequential(first, second), 3)


@pytest.mark.slow
def test_compiled_code_runs_and_counts_alike() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 8))
    eager, compiled = [step(network, rows) for rows in (3, 5)], torch.compile(network)
    torch._dynamo.reset()
    step(compiled, 3)  # compiled under the mode, and counted in that call too
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before
    assert [step(compiled, rows) for rows in (3, 5)] == eager


def test_layouts_tell_batches_of_unlike_size_apart() -> None:
    assert layout_of({"prompts": ("a", "b")}) != layout_of({"prompts": ("a",)})
    assert layout_of((torch.zeros(2), torch.zeros(3))) == layout_of((torch.ones(2), torch.ones(3)))


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
        assert set(row) == {"step", "epoch", "train/tflops_per_second", "time/step"} | {
            f"time/{name}" for name in ("data_wait", "forward", "backward", "optimizer", "ema", "log")
        }
        assert row["time/step"] == pytest.approx(sum(row.get(f"time/{name}", 0.0) for name in PHASES), rel=1e-5)
        assert row["train/tflops_per_second"] > 0
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
    assert torch._C._len_torch_dispatch_stack() == 0
    assert "start" not in vars(trainer.profiler)


def test_a_phase_without_a_listener_is_a_plain_call() -> None:
    assert phase("reward")(lambda: 3)() == 3


EXPECTED = {
    "lrm_tiny": {"encode"},
    "diffusion_dpo_tiny": {"encode"},
    "lpo_tiny": {"encode", "rollout", "reward"},
    "grpo_trajectory_tiny": {"encode", "rollout", "reward"},
    "nft_tiny": {"encode", "rollout", "reward"},
    "refl_tiny": {"encode", "rollout", "reward"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(2, EXPECTED))
def test_phases_of_every_method(name: str, tmp_path: Path) -> None:
    data = [f"--data.root={tmp_path / 'pairs'}"] if "train_pairs" in str(RUNS[name]) else []
    log = ("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.log_every_n_steps=3")
    main(["fit", *RUNS[name], *data, *QUICK, *log, f"--trainer.default_root_dir={tmp_path}"])
    (row,) = logged(tmp_path)
    found = {one.removeprefix("time/") for one in row if one.startswith("time/")} - {"ema"}
    assert found == {"step", "data_wait", "forward", "backward", "optimizer", "log"} | EXPECTED[name]


@pytest.mark.parametrize(
    ("card", "half", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 1.555),
        ("NVIDIA A100-SXM4-80GB", 312, 2.039),
        ("NVIDIA H100 80GB HBM3", 989.4, 3.35),
        ("NVIDIA H100 PCIe", 756, 2.0),
        ("NVIDIA H200", 989.4, 4.8),
        ("NVIDIA L40S", 362, 0.864),
        ("NVIDIA GeForce RTX 4090", 165.2, 1.008),
        ("AMD Instinct MI300X OAM", 1307.4, 5.3),
        ("h100", 989.4, 3.35),
    ],
)
def test_peaks_by_the_name_of_a_card(card: str, half: float, bandwidth: float) -> None:
    assert find_limits(card, "bf16-mixed") == (f"{card}, bf16-mixed", half, bandwidth)


@pytest.mark.parametrize(
    "card",
    [
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla T4",
    ],
)
def test_other_cards_have_no_peak(card: str) -> None:
    assert find_limits(card, "bf16-mixed") is None


@pytest.mark.slow
@pytest.mark.parametrize(("value", "said"), [("0", "performance.peak_tflops: 0.0 is outside"), ("fast", "peak_tflops")])
def test_a_peak_is_a_number_above_0(value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *RUNS["lrm_tiny"], f"--performance.peak_tflops={value}"])
    assert said in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(InputError, match="peak_tflops=-1 must be positive"):
        Performance(peak_tflops=-1.0)
