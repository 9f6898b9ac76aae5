"""Calibration of predicted win probabilities: whether a probability of 0.7 wins seven times in ten."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from latentreward.core.errors import check_range


def bin_by_confidence(win_probability: Tensor, label: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return index of the bin, confidence and outcome of each pair, as flat tensors; see :class:`PairCalibration`."""
    probability = win_probability.detach().float()
    label = label.float().reshape(-1, *[1] * (probability.ndim - 1)).expand_as(probability).flatten()
    lean = probability.flatten() - 0.5
    # Without 1e-4, rounding could put p and 1 - p, which have the same confidence, into different bins.
    index = (2 * lean.abs() * bins + 1e-4).long().clamp(0, bins - 1)
    return index, 0.5 + lean.abs(), 0.5 + torch.sign(lean) * (label - 0.5)


def fit_temperature(gap: np.ndarray, label: np.ndarray) -> float:
    r"""Fit the temperature T > 0 of win probabilities :math:`\sigma(d/T)` by maximum likelihood.

    The log-likelihood is concave in 1/T; the root of its derivative is found by bisection. Gaps ``(N,)`` are scores of
    a minus b, labels the probability that a wins; pairs with NaN or a gap of 0 are left out. The result, in units of
    the scores, is inf if larger gaps do not win more often, or no pair is left.
    """
    known = ~np.isnan(gap) & ~np.isnan(label) & (gap != 0)
    gap, label = gap[known], label[known]
    if not len(gap) or gap @ (label - 0.5) <= 0:
        return float("inf")
    scale = float(np.sqrt(np.mean(gap**2)))
    low, high = 0.0, 1e4  # at a temperature of 1e-4 root mean square gaps all pairs are certain
    # Bisection, not Newton: with separable pairs the maximum lies at infinity.
    for _ in range(80):
        middle = (low + high) / 2
        slope = gap @ (label - 0.5 - 0.5 * np.tanh(gap / scale * middle / 2))
        low, high = (middle, high) if slope > 0 else (low, middle)
    return scale / high


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
    """

    is_differentiable, higher_is_better, full_state_update = False, False, False
    count: Tensor
    confidence_sum: Tensor
    outcome_sum: Tensor

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("[1, inf)", "10 is usual", bins=bins)
        self.bins = bins
        for name in ("count", "confidence_sum", "outcome_sum"):
            self.add_state(name, torch.zeros(bins), dist_reduce_fx="sum")

    def update(self, win_probability: Tensor, label: Tensor) -> None:
        """Add B pairs: predicted probabilities that chosen wins, ``(B,)`` or ``(B, out_dim)``, and labels ``(B,)``."""
        index, confidence, outcome = bin_by_confidence(win_probability, label, self.bins)
        self.count.index_add_(0, index, torch.ones_like(confidence))
        self.confidence_sum.index_add_(0, index, confidence)
        self.outcome_sum.index_add_(0, index, outcome)

    def compute(self) -> Tensor:
        """Return the expected calibration error in [0, 1]; NaN if no pair was seen."""
        return (self.outcome_sum - self.confidence_sum).abs().sum() / self.count.sum()

    def curve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return number of pairs, mean confidence and mean outcome of each bin, each ``(bins,)``.

        Only pairs seen by this process count. Means of empty bins are NaN.
        """
        return self.count, self.confidence_sum / self.count, self.outcome_sum / self.count
