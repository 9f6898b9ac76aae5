"""Scorer of images by a server."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.errors import check_at_least_one
from latentreward.core.promises import check_needs
from latentreward.reward.remote.client import RemoteImages, RemoteServer
from latentreward.reward.remote.schemas import ImageSchema, PlainJSON
from latentreward.reward.scorers.base import ImageScorer


class HTTPScorer(ImageScorer):
    """A scorer that sends images to a server: a VLM judge, or ``latentreward serve``.

    Use the scorer as the held-out scorer of :class:`~latentreward.callbacks.HackingMonitor`, and in
    ``evaluate-policy``, ``benchmark`` and ``score-pairs``. For training see
    :class:`~latentreward.alignment.HTTPReward`.

    Args:
        server: Address, limits, token, and how long to try when the server fails.
        schema: Form of requests and replies; None is :class:`~latentreward.reward.PlainJSON`.
        name: Name of the scores in tables.
        batch_size: Images of a request.

    Example:
        .. code-block:: yaml

            held_out:
              class_path: HTTPScorer
              init_args:
                server: {url: "http://judge:8080"}
                name: judge
    """

    def __init__(
        self, server: RemoteServer, schema: ImageSchema | None = None, *, name: str = "http", batch_size: int = 16
    ) -> None:
        check_at_least_one(batch_size=batch_size)
        super().__init__(name, batch_size * server.parallel)
        self.server, self.schema = server, schema or PlainJSON()
        check_needs(self.schema)
        self._images = RemoteImages(server, self.schema, batch_size)

    def identity(self) -> str:
        """See :meth:`Scorer.identity`: class, address and schema. The server's model is not known before it answers."""
        return f"{type(self).__name__} {self.server.url} {self.schema}"

    @property
    def served_model(self) -> str | None:
        return self._images.model

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`; RemoteError if the server gives no scores."""
        return torch.tensor(self._images.begin(prompts, images)())
