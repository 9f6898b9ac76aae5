"""Steps of the command in forked processes, which need not import everything again."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from latentreward.apps.cli import main
from latentreward.apps.taste.steps import Step
from tests.processes import Forked


def fork_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps run in forks of this process, instead of in processes of their own."""
    monkeypatch.setattr("latentreward.apps.taste.steps.call", call)


def call(step: Step, log: IO[str]) -> int:
    running = Forked(run, [step.arguments], output=Path(log.name))
    try:
        return running.wait(600)
    finally:
        running.kill()


def run(arguments: Sequence[str]) -> None:
    sys.argv = ["latentreward", *arguments]
    main()
