"""The whole path of a pilot in the tiny world, stopped between its stages."""

import signal
import time
from pathlib import Path

import pytest

from latentreward.apps.pilot.plans import all_pilots, find_pilot
from latentreward.apps.pilot.results import collect, read_result, write_result
from latentreward.apps.steps.running import LOG, RECORD, TaskRunner, run_tasks, starts
from tests.apps.steps.forked_steps import ForkedSteps
from tests.apps.steps.test_running import unfinished
from tests.marks import release_after
from tests.processes import start


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "name", release_after(1, [pilot.name for pilot in all_pilots().values() if pilot.device == "cpu"])
)
def test_the_whole_path_in_the_tiny_world(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is stopped between stages; then the stages go on in forked processes, which import nothing anew."""
    monkeypatch.chdir(tmp_path)
    pilot, work = find_pilot(name), tmp_path / "work"
    settings = {"pairs": 64, "seed": 3, "quick": True}
    tasks = pilot.tasks(**settings)
    stopped = start(["pilot", name, "--quick", "--pairs=64", "--seed=3", f"--work={work}"])
    log, until = tasks["held_out"].output(work).parent / LOG, time.monotonic() + 900
    try:
        while not log.is_file() and stopped.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        stopped.send_signal(signal.SIGTERM)
        stopped.wait(120)
    finally:
        stopped.kill()
    assert stopped.returncode == 143, stopped.stderr
    assert "the same command goes on" in stopped.stderr
    first = {*unfinished(tasks, TaskRunner(work))}
    assert {"cache", "drawn"}.isdisjoint(first)
    assert {"published", "train", "benchmark", "align", "judged"} <= first

    runner = ForkedSteps(work)
    run_tasks(tasks.values(), runner)
    kept = tasks["train"].output(work) / "checkpoints" / "last.ckpt"
    before = kept.stat().st_mtime_ns
    (tasks["train"].output(work).parent / RECORD).unlink()  # as if killed between the training's end and its record
    run_tasks(tasks.values(), runner)
    assert kept.stat().st_mtime_ns == before
    assert {name: starts(task.output(work).parent / LOG) for name, task in tasks.items()}["cache"] == 1

    result = collect(pilot, tasks, runner, settings)
    write_result(tmp_path / "results" / "one.json", result)
    assert read_result(tmp_path / "results" / "one.json") == result
    assert result.cut["pairs"] == 64
    assert {one["model"] for one in result.accuracy} == {"pilot", "published"}
    for one in (*result.accuracy, *result.pictures):
        estimate = one.get("estimate") or one["difference"]
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert result.stages["train"]["starts"] == 2
    assert (tasks["align"].output(work) / "lora").is_dir()
    assert (tasks["judged"].output(work) / "report.html").is_file()
