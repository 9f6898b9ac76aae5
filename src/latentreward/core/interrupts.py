"""Handling of Ctrl-C and SIGTERM.

Both end a command with a message about what is kept. Inside :func:`interrupts_held`, they wait for the end of a write.
"""

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
stop_asked = threading.Event()
"""Set while a signal asks a run to stop at its next safe place; long waits should end then."""


class Terminated(KeyboardInterrupt):
    """A SIGTERM, which batch systems, ``timeout`` and ``kill`` send; handled in the same way as a Ctrl-C."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated` inside the block.

    Nothing changes if SIGTERM already has a handler or is ignored, or outside the main thread.
    """
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
    """Return the Ctrl-C or SIGTERM that ``error`` is, or that Lightning turned into this SystemExit; else None."""
    found = error.__context__ if isinstance(error, SystemExit) else error
    return found if isinstance(found, KeyboardInterrupt) else None


@contextmanager
def interrupts_told(kept: Callable[[], str]) -> Iterator[None]:
    """Give a Ctrl-C or SIGTERM inside the block the message that ``kept`` returns then: what is kept, how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        stop = interrupt_behind(error)
        if stop is None:
            raise
        raise type(stop)(kept()) from error


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay a Ctrl-C or SIGTERM until the end of the block, so that a write inside the block is completed."""
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


def tell_interrupt(stop: KeyboardInterrupt) -> None:
    """Print one line about a Ctrl-C or SIGTERM on stderr; only the process of local rank 0 prints."""
    if int(os.environ.get("LOCAL_RANK") or 0) == 0:
        by, kept = "SIGTERM" if isinstance(stop, Terminated) else "Ctrl-C", str(stop)
        print(f"latentreward: stopped by {by}{kept and '; '}{kept}", file=sys.stderr, flush=True)
