"""Base class of preference losses, and helpers for weighted means and for heads with several outputs."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latentreward.contracts import PairScores
from latentreward.promises import Part, detached, finite, returns, wrong_tensor


def beside(values: Tensor, margin: Tensor) -> Tensor:
    """Reshape one value per pair, ``(B,)``, to broadcast against a margin ``(B,)`` or ``(B, out_dim)``."""
    return values.reshape(-1, *(1,) * (margin.ndim - 1))


def mean_over_outputs(values: Tensor) -> Tensor:
    """Average the columns of a head with several outputs: ``(B, out_dim)`` or ``(B,)`` to ``(B,)``."""
    return values if values.ndim == 1 else values.mean(dim=1)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    r"""Compute the weighted mean over pairs, :math:`\sum_i w_i l_i / \sum_i w_i`; 0 if every weight is 0.

    Args:
        values: One value per pair, ``(B,)``.
        weight: Weights, ``(B,)``, which need not sum to 1.

    Returns:
        A scalar in the dtype of ``values``.
    """
    weight = weight.to(values.dtype)
    return (weight * values).sum() / weight.sum().clamp_min(torch.finfo(values.dtype).tiny)


def wide(values: Tensor) -> Tensor:
    """Return ``values`` in float64, on the CPU if their device has no such type."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class SetLoss(nn.Module, Part):
    """Base class of losses that show their settings in ``print(model)``."""

    def extra_repr(self) -> str:
        """Return the loss's numbers and choices, for ``print(model)``."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if not isinstance(value, bool))


def _wrong_losses(losses: Tensor, scores: PairScores, shape: Sequence[int]) -> str | None:
    problem = wrong_tensor(losses, shape) if finite(scores.margin) else None
    return problem or detached(losses, scores.margin)


def _wrong_probabilities(found: Tensor, loss: "PreferenceLoss", scores: PairScores) -> str | None:
    return wrong_tensor(found, scores.chosen.shape, low=0.0, high=1.0) if finite(scores.margin) else None


class PreferenceLoss(SetLoss):
    """Base class of losses over preference pairs.

    ``forward`` needs the pairs of the global batch: with several processes, gather those of all ranks with
    :func:`latentreward.losses.gather_pair_scores` first. Weights are then normalised over the pairs of all ranks, and
    the average of the ranks' gradients, as in DDP, equals the gradient of a single process with all pairs.

    The loss per pair is computed in float64, which costs little for B numbers: with soft labels the gradient is a
    difference of nearly equal terms, imprecise in float32. The result is float32, also under autocast.

    Attributes:
        needs_cross_scores: Whether ``scores.cross`` must be given: scores of every image with every prompt of the
            batch.
    """

    needs_cross_scores: bool = False

    @abstractmethod
    @returns(lambda found, loss, scores: _wrong_losses(found, scores, scores.label.shape))
    def per_pair(self, scores: PairScores) -> Tensor:
        """Compute the unweighted loss of each pair, averaged over the outputs of the head: ``(B,)``, float64."""

    @abstractmethod
    @returns(_wrong_probabilities)
    def win_probability(self, scores: PairScores) -> Tensor:
        """Compute the probability that chosen wins under this loss's model: shape of the scores, float32."""

    @returns(lambda found, loss, scores: _wrong_losses(found, scores, ()))
    def forward(self, scores: PairScores) -> Tensor:
        """Compute the weighted mean of :meth:`per_pair`.

        Args:
            scores: Pairs of all ranks; rewards ``(B,)`` or ``(B, out_dim)``.

        Returns:
            Scalar, float32.

        Raises:
            ValueError: If the columns of ``scores`` do not have one row per pair.
        """
        _check_rows(scores)
        if scores.chosen.device.type == "mps":  # has no float64
            scores = scores.to("cpu")
        return weighted_mean(self.per_pair(scores), scores.weight).float()


def _check_rows(scores: PairScores) -> None:
    rows = scores.chosen.shape[:1]
    if scores.chosen.ndim not in (1, 2) or scores.rejected.shape != scores.chosen.shape:
        raise ValueError(
            f"chosen {tuple(scores.chosen.shape)} and rejected {tuple(scores.rejected.shape)} must both be (B,) or "
            "(B, out_dim)"
        )
    for name in ("label", "weight", "chosen_sigmas", "rejected_sigmas"):
        if getattr(scores, name).shape != rows:  # (1,) would broadcast silently
            raise ValueError(f"{name} has shape {tuple(getattr(scores, name).shape)}, expected {tuple(rows)}")
