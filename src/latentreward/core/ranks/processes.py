"""Processes that Lightning starts for one command: who is whose child, and children that end with their parent."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from latentreward.core.errors import LIGHTNING_NO_GPU, NO_GPU, InputError, first_line

if TYPE_CHECKING:
    from lightning.fabric.strategies import Strategy

PARENT = "LATENTREWARD_PARENT"
"""Environment variable with the ID of the process that started the ranks, valid even after that process has ended."""


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Turn what Lightning says about wrong settings of the processes into an InputError."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except InputError:
        raise
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        problem = first_line(error)
        raise InputError(f"trainer: {NO_GPU if problem.startswith(LIGHTNING_NO_GPU) else problem}") from error


def is_child(strategy: "Strategy") -> bool:
    """Tell whether this process is a rank that Lightning started from the first process of the machine."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    environment, own = getattr(strategy, "cluster_environment", None), str(os.getpid())
    ranked = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
    return ranked and os.environ.get(PARENT, own) != own  # its own ID is that of a rank started by something else


def bind_to_parent(strategy: "Strategy") -> None:
    """Let this process end with its parent if it is a child; otherwise let processes started later know their parent.

    A child ignores Ctrl-C, which the parent gets too, and which ends the children.
    """
    if is_child(strategy):
        parent = os.environ[PARENT]

        def wait_for_end() -> None:
            while str(os.getppid()) == parent:
                time.sleep(1)

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_after(wait_for_end)  # else it would wait half an hour for the process group
    else:
        os.environ[PARENT] = str(os.getpid())


def forget_children() -> None:
    """Let processes started from now on be no ranks of this command."""
    os.environ.pop(PARENT, None)


def end_after(wait: Callable[[], Any]) -> None:
    """Start a thread that kills this process when ``wait`` returns."""

    def watch() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
