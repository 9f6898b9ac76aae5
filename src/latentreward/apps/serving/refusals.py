"""Errors that a server answers with an HTTP status and a message."""

import sys
import time

from latentreward.core.errors import InputError, printable

LOGGED_EVERY_S = 60.0  # seconds after which a refusal of the same kind is printed again
ROWS = 64  # greatest number of rows of a request, if the queue is not shorter
LARGER_QUEUE = "send several requests, or raise the server's --queue"
"""Remedy of requests with more rows than the queue."""
MOST_KINDS = 100  # kinds of refusals that are told apart; of further ones, only the status counts


class RequestError(InputError):
    """An error in the handling of a request, answered as JSON with an HTTP status.

    Args:
        message: One line that says what is wrong and what to do.
        status: HTTP status of the answer.
        retry_after: Seconds after which the client may try again, for the header ``Retry-After``; None for no header.
    """

    def __init__(self, message: str, status: int = 400, retry_after: int | None = None) -> None:
        super().__init__(printable(message))  # it may repeat half a character of the request, which is no UTF-8
        self.status, self.retry_after = status, retry_after


class ScoringError(RequestError):
    """An error of a reward with rows that could be read; other rewards may score them."""


def check_limit(name: str, found: int, most: int, remedy: str = LARGER_QUEUE) -> None:
    """Raise RequestError with status 413 and a remedy if ``found`` is over a limit of the server."""
    if found > most:
        raise RequestError(f"{name} {found} is over this server's limit of {most}; {remedy}", 413)


def fewer_rows(most: int) -> str:
    """Return the remedy of a request with more rows than ``most``, which is :data:`ROWS` or a shorter queue."""
    return LARGER_QUEUE if most < ROWS else "send several requests"


class RefusalLog:
    """Lines on stderr about refused requests, of which some clients never show the answer.

    A kind is a status with the start of the message, up to a colon; one line of a kind is printed in
    :data:`LOGGED_EVERY_S`, with the number of those that were not.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[int, str], tuple[float, int]] = {}

    def tell(self, status: int, message: str) -> None:
        """Print a line about a refusal, unless one of its kind was printed shortly before."""
        kind = status, message.partition(":")[0][:60]
        if kind not in self._told and len(self._told) >= MOST_KINDS:
            kind = status, ""
        last, unsaid = self._told.get(kind, (float("-inf"), 0))
        if time.monotonic() - last < LOGGED_EVERY_S:
            self._told[kind] = last, unsaid + 1
            return
        self._told[kind] = time.monotonic(), 0
        more = f" (and {unsaid} like it before)" if unsaid else ""
        print(f"refused with {status}{more}: {printable(message)[:300]}", file=sys.stderr, flush=True)
