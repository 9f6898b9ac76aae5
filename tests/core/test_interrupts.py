"""Ctrl-C and SIGTERM: a message, a status, and no write in halves."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from latentreward.core.interrupts import Terminated, interrupts_held, interrupts_told, sigterm_interrupts

STOPS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


@pytest.mark.parametrize(("sent", "kind"), STOPS)
def test_a_signal_tells_what_is_kept_and_stays_what_it_is(sent: signal.Signals, kind: type[KeyboardInterrupt]) -> None:
    told = interrupts_told(lambda: "3 of 5 are kept")
    with pytest.raises(KeyboardInterrupt, match="3 of 5 are kept") as stop, sigterm_interrupts(), told:
        os.kill(os.getpid(), sent)
    assert type(stop.value) is kind


@pytest.mark.parametrize(("sent", "kind"), STOPS)
def test_a_signal_in_a_write_takes_effect_after_it(sent: signal.Signals, kind: type[KeyboardInterrupt]) -> None:
    written = []
    with pytest.raises(KeyboardInterrupt) as stop, sigterm_interrupts(), interrupts_held():
        os.kill(os.getpid(), sent)
        written.append(sent)
    assert (type(stop.value), written) == (kind, [sent])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@contextmanager
def handled_by(handler: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handler)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_handler_of_someone_else_s_stays() -> None:
    received: list[int] = []
    with handled_by(lambda number, _: received.append(number)), sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]
