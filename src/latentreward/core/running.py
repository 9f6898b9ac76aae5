"""How modules run: the device that a setting names, evaluation mode for a block, and the phases of a training step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from latentreward.core.errors import InputError, first_line


def find_device(name: str | torch.device) -> torch.device:
    """Return the torch device ``name``, ``auto`` for the accelerator or else the CPU; raise InputError without it."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device is {str(name)!r}: {first_line(error)}; give one that is here, e.g. cpu") from error


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block with ``module`` in evaluation mode; afterwards restore the mode of each submodule."""
    training = [part for part in module.modules() if part.training]
    for part in training:  # not `eval`, which sets thousands of modules of a network that are in this mode already
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


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
