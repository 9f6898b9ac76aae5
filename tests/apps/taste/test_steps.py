"""Steps run once, and go on where they were."""

import subprocess
import sys
from pathlib import Path

import pytest

from latentreward.apps.taste.steps import DONE, LOG, Step
from latentreward.core.errors import InputError
from tests.apps.taste.folders import fork_steps


def test_finished_steps_stay_and_stopped_ones_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fork_steps(monkeypatch)
    wrong = Step.of(tmp_path, "list", ["configs", "--no_such={out}"])
    for _ in range(2):
        with pytest.raises(InputError, match=r"list failed: .*no_such"):
            wrong.run()
        (wrong.output / "left").touch()
    folder = wrong.output.parent
    assert (folder / LOG).read_text().count("$ ") == 2 and (wrong.output / "left").is_file()
    assert not (folder / DONE).exists()
    right = Step.of(tmp_path, "list", ["configs"])
    assert right.output != wrong.output and str(wrong.output) in wrong.arguments[1]
    capsys.readouterr()
    right.run()
    right.run()
    assert "awm_tiny.yaml" in (right.output.parent / LOG).read_text()
    assert capsys.readouterr().out.splitlines()[1:] == ["list: done before"]


def test_a_step_ends_with_the_command_that_was_killed() -> None:
    """Also with one that is killed while the step starts."""
    wait = (
        "import sys; from latentreward.apps.taste import steps; print(1, flush=True); steps.end_with(int(sys.argv[1]))"
    )
    killed = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())])"
    command = subprocess.Popen([sys.executable, "-c", killed, wait], stdout=subprocess.PIPE)
    assert command.stdout is not None and command.stdout.readline() == b"1\n"
    command.kill()
    assert command.stdout.read() == b""  # waits until the step has ended, too: it holds the pipe
    command.wait()
