"""Whether a predicted win probability of 0.7 wins seven times in ten."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from latentreward.errors import InputError


class PairCalibration(Metric):
    r"""Expected calibration error of win probabilities, over equal bins of confidence in [½, 1].

    A pair's confidence is max(p, 1 - p) and its outcome the label of the side it favours (½ where p = ½), so exchanging
    the sides of a pair changes nothing. With n_b pairs in bin b out of N,

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N}\,
        \bigl|\overline{\mathrm{outcome}}_b - \overline{\mathrm{confidence}}_b\bigr|

    Ties (label ½) take part: a calibrated model gives them ½.

    Args:
        bins: Number of bins, at least 1; each is closed below, the last one also above.
        kwargs: For ``torchmetrics.Metric``.

    Raises:
        InputError: If ``bins`` is below 1.
    """

    is_differentiable, higher_is_better, full_state_update = False, False, False
    count: Tensor
    confidence_sum: Tensor
    outcome_sum: Tensor

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise InputError(f"bins = {bins} must be at least 1; 10 is usual")
        self.bins = bins
        self.add_state("count", torch.zeros(bins), dist_reduce_fx="sum")
        self.add_state("confidence_sum", torch.zeros(bins), dist_reduce_fx="sum")
        self.add_state("outcome_sum", torch.zeros(bins), dist_reduce_fx="sum")

    def update(self, win_probability: Tensor, label: Tensor) -> None:
        """Add pairs.

        Args:
            win_probability: Predicted probability that chosen wins, ``(B,)`` or ``(B, out_dim)``, in [0, 1].
            label: Probability that chosen wins, ``(B,)``.
        """
        probability = win_probability.detach().float()
        label = label.float().reshape(-1, *[1] * (probability.ndim - 1)).expand_as(probability).flatten()
        lean = probability.flatten() - 0.5
        outcome = 0.5 + torch.sign(lean) * (label - 0.5)
        # The small lift keeps p and 1 - p, equal up to rounding, on one side of an edge.
        index = (2 * lean.abs() * self.bins + 1e-4).long().clamp(0, self.bins - 1)
        self.count.index_add_(0, index, torch.ones_like(lean))
        self.confidence_sum.index_add_(0, index, 0.5 + lean.abs())
        self.outcome_sum.index_add_(0, index, outcome)

    def compute(self) -> Tensor:
        """The error in [0, 1]; NaN if no pair was seen."""
        return (self.outcome_sum - self.confidence_sum).abs().sum() / self.count.sum()

    def curve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs, mean confidence and mean outcome of each bin on this process, each ``(bins,)``; NaN in empty bins."""
        return self.count, self.confidence_sum / self.count, self.outcome_sum / self.count
