"""Error of a reward server."""

from collections.abc import Callable

from latentreward.errors import InputError


class RemoteError(InputError):
    """A reward server that does not answer, or answers something else than scores.

    Attributes:
        resume: Text on what was saved and how to go on, added to the message once a run has been saved.
    """

    resume: str = ""

    def __str__(self) -> str:
        """Return the message, with :attr:`resume` if it is set."""
        return f"{super().__str__()}; {self.resume}" if self.resume else super().__str__()


def raise_together(failure: RemoteError | None, agree: Callable[[bool], bool]) -> None:
    """Raise RemoteError on all ranks if one of them has met a ``failure``; all ranks call ``agree``."""
    if not agree(failure is None):
        raise failure or RemoteError("the reward server of another rank gave no scores; see that rank's message")
