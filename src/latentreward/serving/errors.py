"""Errors that a server answers with an HTTP status and a message."""

from latentreward.errors import InputError, printable


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
