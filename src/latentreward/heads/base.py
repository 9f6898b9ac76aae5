"""What every reward head promises."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from latentreward.construction import Construction
from latentreward.contracts import Features


class RewardHead(nn.Module, ABC):
    """Features → a score per image, higher is better.

    A head is built from a :class:`~latentreward.contracts.FeatureSpec` first, then its own settings, so that YAML
    states each width once.

    Attributes:
        needs_uncond: Whether the backbone must read the empty prompt too.
        reads_text: Whether it reads text taps; where not, what only they need in the backbone does not train.
        reads_temb: Whether it reads the timestep embedding; likewise.
        built_by: Class and settings that it was made with; None if one of them is not a plain value.
    """

    needs_uncond: bool = False
    reads_text: bool = True
    reads_temb: bool = True
    built_by: Construction | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the settings."""
        head = super().__new__(cls)
        object.__setattr__(
            head, "built_by", Construction.of(cls, args, kwargs, skip=1)
        )  # nn.Module's is not set up yet
        return head

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Scores ``(B,)``, or ``(B, out_dim)`` for a head with several outputs."""

    def score_ensemble(self, levels: Sequence[Features]) -> Tensor:
        """One score per image from features at several noise levels; the mean of the scores unless a head knows better.

        Args:
            levels: The same images at K noise levels.
        """
        return sum(self(features) for features in levels) / len(levels)


class EmbeddingHead(RewardHead):
    """A head whose score is an inner product of an image embedding and a text embedding.

    It can compare any image of a batch with any prompt, which losses with in-batch negatives use.
    """

    @abstractmethod
    def embed(self, features: Features) -> tuple[Tensor, Tensor]:
        """Image and text embeddings ``(B, D)``, not normalised."""

    @abstractmethod
    def similarity(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Score of row i of one against row i of the other: ``(N, D)``, ``(N, D)`` → ``(N,)``."""

    @abstractmethod
    def similarity_matrix(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Score of every prompt against every image: ``(N, D)``, ``(M, D)`` → ``(N, M)``."""
