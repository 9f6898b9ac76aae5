"""Percentile bootstrap: how far a number would move with other prompts; whole groups of dependent rows are drawn."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Why our own resampling: scipy.stats.bootstrap draws rows, and the rows of one prompt depend on each other.
RESAMPLES = 10_000
ENDS = (0.025, 0.975)
FEW = 30
"""Groups below which an interval is too narrow to be shown without their number."""
BLOCK = 1 << 23
"""Most random numbers in memory at a time."""


class Interval(NamedTuple):
    """A number with the ends of its 95 % bootstrap interval.

    All are NaN where no row counts; the ends alone where there is one group, which cannot tell a spread.

    Attributes:
        value: The number.
        low: Lower end.
        high: Upper end.
        groups: Groups that were resampled; None if that is not known.
    """

    value: float
    low: float
    high: float
    groups: int | None = None

    @property
    def few(self) -> bool:
        """Whether there are so few groups that the interval is too narrow."""
        return self.groups is not None and 0 < self.groups < FEW


Statistic = Callable[[np.ndarray], np.ndarray]
"""Sums ``(..., K)`` to values ``(...)``."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum over second, e.g. hits over pairs; NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def ratio_difference(sums: np.ndarray) -> np.ndarray:
    """First over second, minus third over fourth: two models' accuracies on the same groups."""
    return ratio(sums[..., :2]) - ratio(sums[..., 2:])


def group_codes(groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """``(N,)`` int64: the place of each row's group among the sorted names.

    Names are prompts of any length, which an array of text would all pad to the longest.
    """
    if isinstance(groups, np.ndarray) and groups.dtype.kind in "iu":
        return np.unique(groups, return_inverse=True)[1]
    places = {name: place for place, name in enumerate(sorted(set(groups)))}
    return np.fromiter((places[name] for name in groups), np.int64, len(groups))


def group_sums(groups: Sequence[str] | np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Sums of columns over the rows of each group.

    Args:
        groups: N names.
        columns: K arrays ``(N,)``.

    Returns:
        ``(G, K)`` float64, groups by name.
    """
    codes = group_codes(groups)
    number = codes.max(initial=-1) + 1
    return np.stack([np.bincount(codes, column, number) for column in columns], axis=1)


def clustered_interval(
    sums: np.ndarray,
    statistic: Statistic = ratio,
    resamples: int = RESAMPLES,
    seed: int = 0,
    centred: bool = False,
) -> Interval:
    """Value of all groups, and its 95 % interval over resampled groups.

    The groups are the units of the draw, so that rows of one group, such as the pairs of a prompt's images, may
    depend on each other.

    Args:
        sums: ``(G, K)`` what ``statistic`` needs of each group, additive over groups.
        statistic: What is made of the K sums over all groups.
        resamples: Number of resamples of G groups, drawn with replacement.
        seed: Seed of the draw.
        centred: Shift the resampled values so that their mean is the value: for statistics that resampling inflates,
            such as sums of absolute deviations, whose plain interval may lie above the value.

    Returns:
        Ends are quantiles of the resampled values (Efron's percentile method), NaN with fewer than two groups; all is
        NaN without any.
    """
    if not len(sums):
        return Interval(np.nan, np.nan, np.nan, 0)
    value = float(statistic(sums.sum(axis=0)))
    if len(sums) == 1:
        return Interval(value, np.nan, np.nan, 1)
    values = statistic(resample_sums(sums, resamples, seed))
    return Interval(value, *percentile_ends(values + (value - values.mean()) if centred else values), len(sums))


def percentile_ends(values: np.ndarray) -> tuple[float, float]:
    """Ends of the middle 95 % of values; those that are NaN, such as ratios of nothing, are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, ENDS)
    return float(low), float(high)


def resample_sums(sums: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sums over G groups drawn with replacement.

    Args:
        sums: ``(G, K)``.
        resamples: How often.
        seed: Seed of the draw.

    Returns:
        ``(resamples, K)`` float64.
    """
    rng = np.random.default_rng(seed)
    sums = np.asarray(sums, dtype=np.float64)
    kinds, counts = np.unique(sums, axis=0, return_counts=True)
    if 8 * len(kinds) < len(sums):  # how often each kind of group is drawn is multinomial: far fewer numbers to draw
        return rng.multinomial(len(sums), counts / len(sums), size=resamples) @ kinds
    rows = max(1, BLOCK // len(sums))
    return np.concatenate([_draw(sums, min(rows, resamples - n), rng) for n in range(0, resamples, rows)])


def _draw(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    groups = len(sums)
    drawn = rng.integers(groups, size=(resamples, groups), dtype=np.int64)
    drawn += groups * np.arange(resamples)[:, None]
    times = np.bincount(drawn.ravel(), minlength=resamples * groups).reshape(resamples, groups)
    return times.astype(np.float64) @ sums


def clustered_mean(values: np.ndarray, groups: Sequence[str] | np.ndarray) -> Interval:
    """Mean of ``(N,)`` values, with an interval by resampling their N groups; NaN values are left out."""
    known = ~np.isnan(values)
    sums = group_sums(group_codes(groups)[known], values[known], np.ones(known.sum()))
    return clustered_interval(sums)


def bootstrap_interval(differences: Sequence[np.ndarray]) -> Interval:
    """Mean of paired differences and its 95 % interval, by resampling runs and, within each, prompts.

    Args:
        differences: One ``(N,)`` array of differences per run (training seed); with one run, only prompts vary.
    """
    rng = np.random.default_rng(0)
    runs = np.stack(differences)
    drawn = rng.integers(len(runs), size=(RESAMPLES, len(runs)))
    means = np.empty((RESAMPLES, len(runs)))
    for column in range(len(runs)):
        prompts = rng.integers(runs.shape[1], size=(RESAMPLES, runs.shape[1]))
        means[:, column] = runs[drawn[:, column, None], prompts].mean(axis=1)
    return Interval(float(runs.mean()), *percentile_ends(means.mean(axis=1)), runs.shape[1])
