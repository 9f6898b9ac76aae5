"""Base classes of all reward heads."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from latentreward.core.contracts import Features
from latentreward.core.errors import InputError
from latentreward.core.promises import Part, detached, returns, wrong_tensor
from latentreward.core.registry import Construction

AXES = ("fidelity", "aesthetics")
"""Names of the two scores of a head with axes, in the order of its outputs: how well the image follows its prompt, and
how good it looks."""


def check_axes(axes: Sequence[float] | None) -> tuple[float, float] | None:
    """Check the weights of the two axes in the score, and return them; None for a head with one score."""
    if axes is None:
        return None
    sound = len(axes) == len(AXES) and all(math.isfinite(weight) and weight >= 0 for weight in axes) and sum(axes) > 0
    if not sound:
        wanted = f"must be two weights of at least 0, those of {' and '.join(AXES)}, such as [0.5, 0.5]"
        raise InputError(f"axes={list(axes)} {wanted}; null gives one score")
    return float(axes[0]), float(axes[1])


def _wrong_scores(found: Tensor, head: "RewardHead", features: Features) -> str | None:
    rows, outputs = len(features.visual[0]), head.outputs if head.axis_weights is None else len(AXES)
    problem = wrong_tensor(found, (rows,) if outputs == 1 else (rows, outputs))
    if problem and isinstance(found, Tensor) and found.ndim == 2:
        single = found.shape[1] == 1
        problem += "; drop the last axis by squeeze(-1)" if single else ", or set the head's attribute outputs"
    weights = (weight for weight in head.parameters() if weight.requires_grad)
    return problem or detached(found, next(weights, features.visual[0]))


class RewardHead(nn.Module, Part):
    """Network that computes a score per image from a backbone's features; a higher score is better.

    The first parameter of a subclass's constructor is a :class:`~latentreward.core.contracts.FeatureSpec`, which holds
    the widths of the features. YAML sets only the other parameters, so that no width is written twice.

    Attributes:
        outputs: Number of scores per image, 1 for most heads. Losses average over several; commands and alignment need
            one. Ignored if there are ``axis_weights``.
        needs_uncond: Whether ``forward`` needs ``features.uncond``, the features for the empty prompt.
        reads_text: Whether ``forward`` uses ``features.text``. If False, backbone parameters that only text taps need
            are frozen.
        reads_temb: Whether ``forward`` uses ``features.temb``. If False, backbone parameters that only the timestep
            embedding needs are frozen.
        reads_output: Whether ``forward`` uses ``features.output``, which the backbone's ``output_map`` switches on.
        axis_weights: Weights of the two outputs, :data:`AXES`, in the score; None for a head
            without axes, whose output is the score.
        built_by: Record of the constructor call; None if a setting cannot be written as JSON.
    """

    outputs: int = 1
    needs_uncond: bool = False
    reads_text: bool = True
    reads_temb: bool = True
    reads_output: bool = False
    axis_weights: tuple[float, float] | None = None
    built_by: Construction | None = None

    @property
    def changes_buffers(self) -> bool:
        """Whether buffers of the head and of modules in it belong into checkpoints of what trains: if it trains."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the settings in :attr:`built_by`."""
        head = super().__new__(cls)
        # nn.Module.__setattr__ works only after nn.Module.__init__.
        object.__setattr__(head, "built_by", Construction.of(cls, args, kwargs, skip=1))
        return head

    @abstractmethod
    @returns(_wrong_scores)
    def forward(self, features: Features) -> Tensor:
        """Compute scores ``(B,)``, or ``(B, out_dim)`` for a head with several :attr:`outputs`."""

    def total(self, outputs: Tensor) -> Tensor:
        """Reduce outputs to scores: the weighted sum of two axes, ``(..., 2)`` → ``(...)``, else the outputs."""
        if self.axis_weights is None:
            return outputs
        # not a matrix product, which autocast would round to bfloat16
        return (outputs * outputs.new_tensor(self.axis_weights)).sum(dim=-1)

    @returns(lambda found, head, levels: _wrong_scores(found, head, levels[0]))
    def score_ensemble(self, levels: Sequence[Features]) -> Tensor:
        """Compute one score per image from features at several noise levels; the base class averages the scores."""
        return sum(self(features) for features in levels) / len(levels)


class EmbeddingHead(RewardHead):
    """Head whose score is a similarity of an image embedding and a text embedding.

    Such a head can score any image of a batch for any prompt, which losses with in-batch negatives need.
    """

    @abstractmethod
    def embed(self, features: Features) -> tuple[Tensor, Tensor]:
        """Compute image and text embeddings, each ``(B, D)`` and not normalised."""

    @abstractmethod
    @returns(lambda found, head, images, texts: wrong_tensor(found, (len(images),)))
    def similarity(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compute the score of each image for the prompt of the same row: ``(N, D)``, ``(N, D)`` → ``(N,)``."""

    @abstractmethod
    @returns(lambda found, head, *given: wrong_tensor(found, [*map(len, given)]))
    def similarity_matrix(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Compute the score of every image for every prompt: texts ``(N, D)``, images ``(M, D)`` → ``(N, M)``."""
