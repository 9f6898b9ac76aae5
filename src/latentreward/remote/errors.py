"""Error of a reward server."""

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
