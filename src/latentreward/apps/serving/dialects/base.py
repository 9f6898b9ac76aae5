"""Base class of the wire formats."""

from abc import ABC, abstractmethod

from latentreward.apps.serving.routes import Route
from latentreward.apps.serving.served import ScoringService


class Dialect(ABC):
    """Base class of a wire format: the handlers of its routes.

    Args:
        service: Service that scores.
    """

    def __init__(self, service: ScoringService) -> None:
        self.service = service

    @abstractmethod
    def routes(self) -> list[Route]:
        """Return the routes."""
