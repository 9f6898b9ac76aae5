"""Rows are measured once: results and steps are used again while settings and source files are the same."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from latentreward.core.errors import InputError
from tools.reproduce import measure_rows, missing
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
