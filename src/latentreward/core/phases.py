"""Phases of a training step: named where the work is done, told apart by whoever listens."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PHASES = ("data_wait", "encode", "rollout", "reward", "forward", "backward", "optimizer", "ema", "log")
"""Names of the phases, in the order of tables."""
LISTENER: "ContextVar[Phases | None]" = ContextVar("LISTENER", default=None)
"""Phases of this thread's run; None tells nothing apart. Threads of a server or of a backward pass have none."""


class Phases:
    """Phases that are open, of which the innermost counts.

    Args:
        outermost: Phase of what is in no other.
    """

    def __init__(self, outermost: str) -> None:
        self.open, self.pid = [outermost], os.getpid()

    def begin(self, name: str) -> None:
        """Begin a phase within the present one."""
        self.open.append(name)

    def end(self) -> None:
        """End the innermost phase."""
        self.open.pop()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count a block to a phase of a step, see :data:`PHASES`; as a decorator, each call of a function."""
    phases = LISTENER.get()
    if phases is None or phases.pid != os.getpid():  # a worker that was forked has no part in the run's time
        yield
        return
    phases.begin(name)
    try:
        yield
    finally:
        phases.end()
