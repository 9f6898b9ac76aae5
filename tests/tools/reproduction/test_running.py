"""Rows are measured once: results and steps are used again while settings and source files are the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from latentreward.core.errors import InputError
from tools.reproduce import measure_rows, missing, spend, task_runner
from tools.reproduction.planning import Planner
from tools.reproduction.results import judge_claim, read_results
from tools.reproduction.rows import Row, read_row
from tools.reproduction.running import StepRunner

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.tools.reproduction.toy_step"
TOY: dict[str, Any] = {
    "title": "A better reward ranks better",
    "paper": "LRM",
    "claim": "Ours: one beats the other.",
    "run": "Two arms.",
    "cpu_seconds": 3,
    "steps": {
        "toy_pairs": {"module": MODULE, "run": "pairs {out}"},
        "toy_scores": {"module": MODULE, "run": "scores {out} {toy_pairs} {seed}", "pairs": "toy_pairs"},
    },
    "arms": {"good": {"toy_scores": "9.0"}, "bad": {"toy_scores": "0.0"}},
    "metrics": {
        "accuracy": {"of": "toy_scores", "kind": "accuracy", "timestep": 1},
        "turned": {"of": "toy_scores", "kind": "turned", "timestep": 801},
    },
    "claims": [{"says": "good beats bad", "higher": "good", "lower": "bad", "by": "accuracy"}],
}


@pytest.fixture(autouse=True)
def _modules_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))


def measure(folder: Path, *rows: Row, stale: bool = False) -> set[str]:
    """Measure what is missing; return the folders of the steps that ran."""
    begun = time.time_ns()
    measure_rows(missing(rows, folder / "results", stale), folder / "results", folder / "work", 2)
    return {path.parent.name for path in folder.glob("work/*/log.txt") if path.stat().st_mtime_ns >= begun}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Folder with the toy row measured, and the steps that ran."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
        return folder, measure(folder, read_row("toy", TOY))


@pytest.fixture
def folder(measured: tuple[Path, set[str]], tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(measured[0], tmp_path / "copy"))


def test_each_seed_is_measured_once_and_equal_steps_run_once(measured: tuple[Path, set[str]]) -> None:
    row, (folder, ran) = read_row("toy", TOY), measured
    assert sorted(name.rpartition("-")[0] for name in ran) == ["toy_pairs"] + 6 * ["toy_scores"]
    results = read_results(folder / "results", row)
    assert list(results) == [10, 11, 12]
    means = {arm: [one.measured[arm]["accuracy"]["mean"] for one in results.values()] for arm in row.arms}
    assert min(means["good"]) > 0.9
    assert 0.2 < min(means["bad"]) <= max(means["bad"]) < 0.8
    assert results[10].measured["bad"]["turned"]["mean"] > 0.3 > results[10].measured["good"]["turned"]["mean"]
    assert len(results[10].tasks) == 3
    assert results[10].versions["torch"]
    assert all(path.stat().st_size < 20_000 for path in folder.rglob("seed*.json"))
    assert judge_claim(row.claims[0], results, row).word == "holds"
    assert missing([row], folder / "results", stale=True) == []


@pytest.mark.slow
def test_a_budget_adds_seeds_and_goes_on_where_it_ended(folder: Path) -> None:
    claims = [{**TOY["claims"][0], "more_than": 0.45}]
    row, results, work = read_row("toy", {**TOY, "claims": claims}), folder / "results", folder / "work"
    assert judge_claim(row.claims[0], read_results(results, row), row).word == "open"
    for last in (13, 14):
        (choice,) = Planner([row], results, task_runner(work).done).chosen(2, 1e9)
        assert choice.seed == last
        spend([row], results, work, 2, 1.3 * choice.seconds)
        assert list(read_results(results, row)) == [10, 11, 12, *range(13, last + 1)]
    spend([row], results, work, 2, 0.1)
    assert len(read_results(results, row)) == 5


def test_a_step_whose_source_or_input_has_changed_runs_again(folder: Path) -> None:
    runner, task = StepRunner(folder / "work"), read_row("toy", TOY).task("good", "toy_scores", 10)
    assert runner.done(task) is not None
    record = task.inputs["toy_pairs"].output(folder / "work").parent / "record.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "source": "0"}))
    assert runner.done(task.inputs["toy_pairs"]) is None
    assert runner.done(task) is None
    record.write_text(json.dumps(content))
    assert runner.done(task) is not None
    own = task.output(folder / "work").parent / "record.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "inputs": {task.inputs["toy_pairs"].key: "0"}}))
    assert runner.done(task) is None


def test_a_failed_step_is_named_and_other_rows_are_measured(folder: Path) -> None:
    row = read_row("toy", TOY)
    steps = {**TOY["steps"], "toy_pairs": {**TOY["steps"]["toy_pairs"], "run": "nothing {out}"}}
    broken = read_row("broken", {**TOY, "steps": steps})
    (folder / "results/toy/seed11.json").unlink()
    with pytest.raises(InputError, match="1 steps failed; the first: toy_pairs failed: no kind nothing"):
        measure(folder, broken, row)
    assert len(read_results(folder / "results", row)) == 3
    assert read_results(folder / "results", broken) == {}


INTERRUPTED = """
import sys
from pathlib import Path
from latentreward.core.interrupts import sigterm_interrupts
from tools.reproduction.rows import read_row
from tools.reproduce import measure_rows, missing
from tests.tools.reproduction.test_running import TOY
folder = Path(sys.argv[1])
waiting = {**TOY["steps"], "toy_scores": {**TOY["steps"]["toy_scores"], "run": "wait {out} {toy_pairs} {seed}"}}
row = read_row("toy", {**TOY, "steps": waiting})
with sigterm_interrupts():
    measure_rows(missing([row], folder / "results", False), folder / "results", folder / "work", 1)
"""


@pytest.mark.slow
def test_an_interrupt_ends_the_processes_and_keeps_what_is_done(tmp_path: Path) -> None:
    running = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], stderr=subprocess.PIPE)
    logs: list[Path] = []
    until = time.monotonic() + 600
    while not (logs and "toy step wait" in logs[0].read_text()) and time.monotonic() < until:
        logs = list(tmp_path.glob("work/toy_scores-*/log.txt"))
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=300)
    assert running.returncode
    folder = logs[0].parent
    assert not (folder / "record.json").exists()
    assert len(list(tmp_path.glob("work/toy_pairs-*/record.json"))) == 1
    ran = measure(tmp_path, read_row("toy", TOY))
    assert not any(name.startswith("toy_pairs") for name in ran)


def test_a_step_ends_with_the_command_that_was_killed(tmp_path: Path) -> None:
    step = [str(tmp_path / "record"), MODULE, "wait", "."]
    program = "[sys.executable, '-m', 'tools.reproduction.process', str(os.getpid()), *sys.argv[1:]]"
    killed = f"import os, subprocess, sys; subprocess.run({program})"
    command = subprocess.Popen([sys.executable, "-c", killed, *step], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "toy step wait\n"
    command.kill()
    assert command.stdout.read() == ""  # waits until the step has ended, too: it holds the pipe
    command.wait()
