"""Ctrl-C: an end at once while modules are loaded, an end with a message later, none in the midst of a write."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Find the Ctrl-C that ``error`` is, or that Lightning turned into an exit with status 1."""
    found = error.__context__ if isinstance(error, SystemExit) else error
    return found if isinstance(found, KeyboardInterrupt) else None


@contextmanager
def interrupts_told(kept: Callable[[], str]) -> Iterator[None]:
    """Have a Ctrl-C inside the block say what is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if interrupt_behind(error) is None:
            raise
        raise KeyboardInterrupt(kept()) from error


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let a Ctrl-C inside the block take effect at its end, so that a write is done whole."""
    held: list[tuple[int, FrameType | None]] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])


@contextmanager
def exit_while_importing() -> Iterator[None]:
    """End the process at a Ctrl-C inside the block.

    An exception would not do: compiled modules that are being imported replace it by an ``ImportError``.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        tell_interrupt()
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tell_interrupt(kept: str = "") -> None:
    """Print the line about a Ctrl-C; of several processes of a run, which all get it, the first one does."""
    if int(os.environ.get("LOCAL_RANK") or 0) == 0:
        print(f"latentreward: stopped by Ctrl-C{kept and '; '}{kept}", file=sys.stderr, flush=True)
