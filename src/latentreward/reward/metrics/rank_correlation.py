"""Agreement of two scores: rank correlation, linear correlation, and share of pairs that both order the same way."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from latentreward.core.bootstrap import Interval, clustered_interval, group_codes, group_sums
from latentreward.core.errors import check_choices

Kind = Literal["spearman", "pearson"]


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Return ``(N,)`` ranks from 1; equal values all get the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def correlation(moments: np.ndarray) -> np.ndarray:
    """Compute Pearson's r from sums of 1, x, y, x², y², xy ``(..., 6)``; NaN where x or y does not vary."""
    count, x, y, xx, yy, xy = np.moveaxis(moments, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        variances = (xx - x * x / count).clip(0) * (yy - y * y / count).clip(0)
        return np.where(variances > 0, (xy - x * y / count) / np.sqrt(variances), np.nan)


def clustered_correlation(
    x: np.ndarray, y: np.ndarray, groups: Sequence[str] | np.ndarray, kind: Kind = "spearman"
) -> Interval:
    """Compute the correlation of two scores with a 95 % interval by resampling groups.

    Rows where one of the scores ``(N,)`` is NaN are left out. For ``spearman``, equal scores get their mean rank; ranks
    are computed once among all rows and not within each resample; the difference is O(1/N).
    """
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known].astype(np.float64), y[known].astype(np.float64)
    if kind == "spearman":
        x, y = average_ranks(x), average_ranks(y)
    # Sums of squares of large means would cancel; r does not change by shift and scale.
    x, y = _standardise(x), _standardise(y)
    sums = group_sums(group_codes(groups)[known], np.ones(len(x)), x, y, x * x, y * y, x * y)
    return clustered_interval(sums, correlation)


def _standardise(values: np.ndarray) -> np.ndarray:
    """Scale values to mean 0 and standard deviation 1, so that sums of squares keep precision; 0 if all are equal."""
    if not len(values) or np.ptp(values) == 0:
        return np.zeros(len(values))
    centred = values - values.mean()
    return centred / np.sqrt(np.mean(centred**2))


def same_order(gap: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return ``(N,)`` 1 where two gaps have the same sign or are both 0, else 0; NaN where either gap is NaN."""
    return np.where(np.isnan(gap) | np.isnan(other), np.nan, np.sign(gap) == np.sign(other))


class ScoreCorrelation(Metric):
    """Correlation of two scores of the same images, over all images seen.

    All scores are kept in memory, because ranks need them.

    Args:
        kind: ``pearson``, or ``spearman``, where equal scores get their mean rank.
        kwargs: For ``torchmetrics.Metric``.
    """

    is_differentiable, higher_is_better, full_state_update = False, None, False
    first: list[Tensor]
    second: list[Tensor]

    def __init__(self, kind: Kind = "spearman", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choices(ScoreCorrelation, kind=kind)
        self.kind = kind
        self.add_state("first", [], dist_reduce_fx="cat")
        self.add_state("second", [], dist_reduce_fx="cat")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add B images with their ``(B,)`` first and ``(B,)`` second scores."""
        self.first.append(first.detach().double())
        self.second.append(second.detach().double())

    def compute(self) -> Tensor:
        """Return the correlation in [-1, 1]; NaN with fewer than two images, or if a score does not vary."""
        x, y = (dim_zero_cat(s).cpu().numpy() if len(s) else np.empty(0) for s in (self.first, self.second))
        value = clustered_correlation(x, y, np.zeros(len(x), dtype=int), self.kind).value
        return torch.tensor(value, dtype=torch.float32)
