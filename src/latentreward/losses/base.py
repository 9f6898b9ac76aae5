"""What every preference loss shares: the global weighted mean, outputs of several columns, and the base class."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from latentreward.contracts import PairScores


def beside(values: Tensor, margin: Tensor) -> Tensor:
    """View one value per pair, ``(B,)``, so that it broadcasts against a margin ``(B,)`` or ``(B, out_dim)``."""
    return values.reshape(-1, *(1,) * (margin.ndim - 1))


def mean_over_outputs(values: Tensor) -> Tensor:
    """Average the columns of a head with several outputs: ``(B, out_dim)`` or ``(B,)`` to ``(B,)``."""
    return values if values.ndim == 1 else values.mean(dim=1)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    r"""Mean over pairs, :math:`\sum_i w_i l_i / \sum_i w_i`; 0 if every weight is 0.

    Args:
        values: One value per pair, ``(B,)``.
        weight: Weights not yet normalised, ``(B,)``.

    Returns:
        A scalar in the dtype of ``values``.
    """
    weight = weight.to(values.dtype)
    return (weight * values).sum() / weight.sum().clamp_min(torch.finfo(values.dtype).tiny)


class SetLoss(nn.Module):
    """A loss that shows its settings."""

    def extra_repr(self) -> str:
        """Numbers and choices, for ``print(model)``."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if not isinstance(value, bool))


class PreferenceLoss(SetLoss, ABC):
    """A loss over preference pairs.

    ``forward`` treats its input as the whole batch: under several processes pass it through
    :func:`latentreward.losses.gather_pair_scores` first. Then the weights are normalised over the batch of all ranks,
    and averaging the ranks' gradients, as DDP does, gives the gradient of one process with all pairs.

    Pairs are computed in float64: they are B numbers, and with soft labels the gradient is a difference of nearly
    equal terms, of which float32 keeps few digits. The scalar is float32, also under autocast.

    Attributes:
        needs_cross_scores: Whether ``scores.cross`` must be given, so that the head must score every image against
            every prompt of the batch.
    """

    needs_cross_scores: bool = False

    @abstractmethod
    def per_pair(self, scores: PairScores) -> Tensor:
        """Loss of each pair, unweighted, averaged over the outputs of the head: ``(B,)``, float64."""

    @abstractmethod
    def win_probability(self, scores: PairScores) -> Tensor:
        """Probability that chosen wins as the model of this loss sees it, in the shape of the scores, float32."""

    def forward(self, scores: PairScores) -> Tensor:
        """Weighted mean over the pairs.

        Args:
            scores: Pairs of all ranks; chosen and rejected rewards ``(B,)`` or ``(B, out_dim)``.

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
