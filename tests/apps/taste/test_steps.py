"""Tasks run once, go on where they were, and start again when an input was made again."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest

from latentreward.apps.taste.steps import LOG, RECORD, Step, Task, TaskRunner, progress, resolve, run_tasks
from latentreward.core.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.apps.taste.toy_step"


def toy(skill: str) -> dict[str, Task]:
    """Two stages, of which the second reads the first, and fails unless ``skill`` is a number."""
    steps = {
        "pairs": Step(("pairs", "{out}"), MODULE),
        "scores": Step(("scores", "{out}", "{pairs}", "{seed}", skill), MODULE),
    }
    return {name: resolve(steps, name, 0) for name in steps}


def unfinished(tasks: Mapping[str, Task], runner: TaskRunner) -> list[str]:
    """Names of the tasks that have not finished, or whose inputs were made again."""
    return [name for name, task in tasks.items() if runner.done(task) is None]


@pytest.mark.slow
def test_finished_stages_stay_and_stopped_ones_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    runner, tasks = TaskRunner(tmp_path), toy("high")
    with pytest.raises(InputError, match=r"scores failed: ValueError: could not convert string to float: 'high'"):
        run_tasks(tasks.values(), runner)
    assert unfinished(tasks, runner) == ["scores"]
    left = tasks["scores"].output(tmp_path)
    (left / "left").touch()
    with pytest.raises(InputError, match="scores failed"):
        run_tasks(tasks.values(), TaskRunner(tmp_path))
    assert (left / "left").is_file()
    assert (left.parent / LOG).read_text().count("$ ") == 2
    assert not (left.parent / RECORD).exists()
    assert "pairs: done before" in capsys.readouterr().out
    run_tasks((changed := toy("2.0")).values(), TaskRunner(tmp_path))
    assert changed["pairs"].key == tasks["pairs"].key
    assert changed["scores"].output(tmp_path) != left
    assert unfinished(changed, runner) == []


def outputs(tasks: Mapping[str, Task], folder: Path) -> Iterator[Path]:
    """Folders of the stages' logs and records."""
    return (task.output(folder).parent for task in tasks.values())


@pytest.mark.slow
@pytest.mark.parametrize("skill", ["2.0", "high"], ids=["finished", "stopped"])
def test_a_stage_whose_input_was_made_again_starts_anew(
    skill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    tasks = toy(skill)
    ends = nullcontext() if skill == "2.0" else pytest.raises(InputError, match="scores failed")
    with ends:
        run_tasks(tasks.values(), TaskRunner(tmp_path))
    pairs, scores = outputs(tasks, tmp_path)
    (scores / "out" / "left").touch()
    shutil.rmtree(pairs)
    capsys.readouterr()
    with ends:
        run_tasks(tasks.values(), TaskRunner(tmp_path))
    assert "scores: starts;" in capsys.readouterr().out
    assert not (scores / "out" / "left").exists()
    assert (scores / LOG).read_text().count("$ ") == 1


def test_the_progress_of_a_stage_is_the_last_line_of_its_log_with_the_time_left(tmp_path: Path) -> None:
    log = tmp_path / LOG
    assert progress(log) == ""
    log.write_text(
        "train 1/9 steps   2.0 steps/s  00:04 left\n train 2/9 steps   2.1 steps/s  00:03 left\nnote: nothing\n"
    )
    assert progress(log) == "train 2/9 steps   2.1 steps/s  00:03 left"
