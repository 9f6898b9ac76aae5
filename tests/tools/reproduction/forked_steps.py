"""Steps of rows in forked processes, which need not import everything again."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.processes import Forked
from tools.reproduction import process
from tools.reproduction.running import StepRunner
from tools.reproduction.tasks import Task


class ForkedSteps(StepRunner):
    """A runner whose processes are forked from one that has imported torch and Lightning."""

    def source(self, modules: Iterable[str]) -> str:
        return ""

    def _call(self, task: Task, command: Sequence[str], log: int) -> int:
        printed = Path(f"/proc/self/fd/{log}").readlink()
        running = Forked(run_step, [tuple(command[3:])], output=printed)
        try:
            return running.wait(600)
        finally:
            running.kill()


def run_step(arguments: Sequence[str]) -> None:
    """What ``python -m tools.reproduction.process`` does with these arguments."""
    sys.argv = ["process", *arguments]
    process.main()
