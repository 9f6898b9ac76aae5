"""Stages run once, go on where they were, and start again when a setting changes; the whole path in the tiny world."""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from latentreward.errors import InputError
from latentreward.pilot.plans import all_pilots, find_pilot
from latentreward.pilot.results import collect, holds, read_result, write_result
from latentreward.pilot.running import progress, run_stages, starts, unfinished, workshop
from latentreward.steps.tasks import Step, Task, resolve
from latentreward.steps.workshop import LOG, RECORD
from tests.marks import release_after
from tests.processes import start
from tests.steps.forked_steps import ForkedSteps

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.steps.toy_step"


def toy(skill: str) -> dict[str, Task]:
    """Two stages, of which the second reads the first, and fails unless ``skill`` is a number."""
    steps = {
        "pairs": Step("pairs {out}", MODULE),
        "scores": Step(f"scores {{out}} {{pairs}} {{seed}} {skill}", MODULE),
    }
    return {name: resolve(steps, name, 0, {}) for name in steps}


def test_finished_stages_stay_and_stopped_ones_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    shop, tasks = workshop(tmp_path), toy("high")
    with pytest.raises(InputError, match=r"scores failed: ValueError: could not convert string to float: 'high'"):
        run_stages(tasks, shop)
    assert [task.name for task in unfinished(tasks, shop)] == ["scores"]
    left = tasks["scores"].output(tmp_path)
    (left / "left").touch()
    with pytest.raises(InputError, match="scores failed"):
        run_stages(tasks, workshop(tmp_path))
    assert (left / "left").is_file()
    assert starts(left.parent / LOG) == 2
    assert not (left.parent / RECORD).exists()
    assert "pairs: done before" in capsys.readouterr().out
    run_stages(changed := toy("2.0"), workshop(tmp_path))
    assert changed["pairs"].key == tasks["pairs"].key
    assert changed["scores"].output(tmp_path) != left
    assert unfinished(changed, shop) == []


def outputs(tasks: Mapping[str, Task], folder: Path) -> Iterator[Path]:
    """Folders of the stages' logs and records."""
    return (task.output(folder).parent for task in tasks.values())


@pytest.mark.parametrize("skill", ["2.0", "high"], ids=["finished", "stopped"])
def test_a_stage_whose_input_was_made_again_starts_anew(
    skill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    tasks = toy(skill)
    ends = nullcontext() if skill == "2.0" else pytest.raises(InputError, match="scores failed")
    with ends:
        run_stages(tasks, workshop(tmp_path))
    pairs, scores = outputs(tasks, tmp_path)
    (scores / "out" / "left").touch()
    shutil.rmtree(pairs)
    capsys.readouterr()
    with ends:
        run_stages(tasks, workshop(tmp_path))
    assert "scores: starts;" in capsys.readouterr().out
    assert not (scores / "out" / "left").exists()
    assert starts(scores / LOG) == 1


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
    first = {task.name for task in unfinished(tasks, workshop(work))}
    assert {"cache", "drawn"}.isdisjoint(first)
    assert {"published", "train", "benchmark", "align", "judged"} <= first

    shop = ForkedSteps(work, resumes=True, environment={})
    run_stages(tasks, shop)
    kept = tasks["train"].output(work) / "checkpoints" / "last.ckpt"
    before = kept.stat().st_mtime_ns
    (tasks["train"].output(work).parent / RECORD).unlink()  # as if killed between the training's end and its record
    run_stages(tasks, shop)
    assert kept.stat().st_mtime_ns == before
    assert {name: starts(task.output(work).parent / LOG) for name, task in tasks.items()}["cache"] == 1

    result = collect(pilot, tasks, shop, settings)
    write_result(tmp_path / "results" / "one.json", result)
    assert read_result(tmp_path / "results" / "one.json") == result
    assert holds(tmp_path / "results" / "one.json", replace(result, machine={}, commit="another"))
    assert not holds(tmp_path / "results" / "one.json", replace(result, settings={**result.settings, "seed": 4}))
    (tmp_path / "half.json").write_text('{"half')
    assert not any(holds(tmp_path / name, result) for name in ("half.json", "missing.json"))
    assert result.cut["pairs"] == 64
    assert {one["model"] for one in result.accuracy} == {"pilot", "published"}
    for one in (*result.accuracy, *result.pictures):
        estimate = one.get("estimate") or one["difference"]
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert result.stages["train"]["starts"] == 2
    assert (tasks["align"].output(work) / "lora").is_dir()
    assert (tasks["judged"].output(work) / "report.html").is_file()


def test_the_progress_of_a_stage_is_the_last_line_of_its_log_with_the_time_left(tmp_path: Path) -> None:
    log = tmp_path / LOG
    assert progress(log) == ""
    log.write_text(
        "train 1/9 steps   2.0 steps/s  00:04 left\n train 2/9 steps   2.1 steps/s  00:03 left\nnote: nothing\n"
    )
    assert progress(log) == "train 2/9 steps   2.1 steps/s  00:03 left"
