"""Ctrl-C and SIGTERM: an end at once while modules are loaded, with a message later, after a write in its midst."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
TERMINATED = 143
"""Exit status after SIGTERM."""


class Terminated(KeyboardInterrupt):
    """A SIGTERM, by which batch systems, ``timeout`` and ``kill`` ask for what a Ctrl-C asks for."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM inside the block raise :class:`Terminated`, unless it has a handler or is ignored."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Find the Ctrl-C or SIGTERM that ``error`` is, or that Lightning turned into an exit with status 1."""
    found = error.__context__ if isinstance(error, SystemExit) else error
    return found if isinstance(found, KeyboardInterrupt) else None


@contextmanager
def interrupts_told(kept: Callable[[], str]) -> Iterator[None]:
    """Have a Ctrl-C or SIGTERM inside the block say what is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        stop = interrupt_behind(error)
        if stop is None:
            raise
        raise type(stop)(kept()) from error


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let a Ctrl-C or SIGTERM inside the block take effect at its end, so that a write is done whole."""
    held: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in before:
        signal.signal(number, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            before[signal.Signals(held[0][0])](*held[0])


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
        tell_interrupt(KeyboardInterrupt())
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tell_interrupt(stop: KeyboardInterrupt) -> None:
    """Print the line about a Ctrl-C or SIGTERM; of several processes of a run, which all get it, the first one does."""
    if int(os.environ.get("LOCAL_RANK") or 0) == 0:
        by, kept = "SIGTERM" if isinstance(stop, Terminated) else "Ctrl-C", str(stop)
        print(f"latentreward: stopped by {by}{kept and '; '}{kept}", file=sys.stderr, flush=True)
