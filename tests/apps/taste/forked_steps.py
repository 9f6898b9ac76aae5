"""Steps of rows in forked processes, which need not import everything again."""

import sys
from collections.abc import Sequence
from pathlib import Path

from latentreward.apps.taste import process
from latentreward.apps.taste.steps import TaskRunner
from tests.processes import Forked


class ForkedSteps(TaskRunner):
    """A runner whose processes are forked from one that has imported torch and Lightning."""

    def _call(self, command: Sequence[str], log: int) -> int:
        printed = Path(f"/proc/self/fd/{log}").readlink()
        running = Forked(run_step, [tuple(command[3:])], output=printed)
        try:
            return running.wait(600)
        finally:
            running.kill()


def run_step(arguments: Sequence[str]) -> None:
    """What ``python -m latentreward.apps.taste.process`` does with these arguments."""
    sys.argv = ["process", *arguments]
    process.main()
