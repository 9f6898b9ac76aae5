"""Percentile bootstrap that resamples whole groups of dependent rows, such as the pairs of one prompt."""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# Why our own resampling: scipy.stats.bootstrap draws rows, and the rows of one prompt depend on each other.
RESAMPLES = 10_000
ENDS = (0.025, 0.975)
FEW = 30
"""Number of groups below which reports show that number beside an interval, because the interval is too narrow."""
BLOCK, DRAWN = 1 << 23, 1 << 17
"""Largest number of counts of drawn groups in memory at a time, and of random integers; these should fit in a cache."""
MANY, BUNDLES = 10_000, 4_000
"""Number of groups above which random bundles of groups are resampled in their place, and number of bundles.

The work no longer grows with the number of groups. Bundles of independent groups are independent, and the variance of
their total is that of the groups' total: interval ends vary by 1 % of the interval's half with the bundles, less than
with the resamples.
"""


class Interval(NamedTuple):
    """Number with the ends of its 95 % interval.

    Value and ends are NaN without any group. The ends are NaN with one group, which shows no spread.
    """

    value: float
    low: float
    high: float
    groups: int | None = None  # that were resampled; None if unknown

    @property
    def few(self) -> bool:
        """Tell whether the interval is too narrow because there are fewer than ``FEW`` groups."""
        return self.groups is not None and 0 < self.groups < FEW


def ratio(sums: np.ndarray) -> np.ndarray:
    """Divide the first sum by the second, e.g. hits by pairs; NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def ratio_difference(sums: np.ndarray) -> np.ndarray:
    """Subtract two ratios: first sum by second, minus third by fourth, e.g. the accuracies of two models."""
    return ratio(sums[..., :2]) - ratio(sums[..., 2:])


def group_codes(groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return the ``(N,)`` int64 index of each row's group among the sorted names of groups.

    Names are handled in Python, because a NumPy array of text would pad every prompt to the length of the longest.
    """
    if isinstance(groups, np.ndarray) and groups.dtype.kind in "iu":
        return np.unique(groups, return_inverse=True)[1]
    index = {name: number for number, name in enumerate(sorted(set(groups)))}
    return np.fromiter((index[name] for name in groups), np.int64, len(groups))


def two_folds(groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return ``(N,)`` bool, whether each row belongs to the second half of the groups; the split has a fixed seed."""
    codes = group_codes(groups)
    return (np.random.default_rng(0).permutation(codes.max(initial=-1) + 1) % 2 == 1)[codes]


def group_sums(groups: Sequence[str] | np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Sum K columns ``(N,)`` over the rows of each group: ``(G, K)`` float64, in the order of the groups' names."""
    codes = group_codes(groups)
    number = codes.max(initial=-1) + 1
    return np.stack([np.bincount(codes, column, number) for column in columns], axis=1)


def clustered_interval(
    sums: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = ratio,
    resamples: int = RESAMPLES,
    seed: int = 0,
    centred: bool = False,
) -> Interval:
    """Compute a statistic of all groups and its 95 % interval over resampled groups.

    Groups are resampled as a whole, so rows of one group, such as the pairs of a prompt's images, may depend on each
    other.

    Args:
        sums: ``(G, K)`` sums of each group that ``statistic`` needs; the sums of all groups are their total.
        statistic: Function from sums ``(..., K)`` to values ``(...)``.
        resamples: Number of resamples of G groups, drawn with replacement.
        seed: Seed of the resampling.
        centred: Whether to shift the resampled values so that their mean is the value. Needed for statistics that
            resampling inflates, such as sums of absolute deviations: their plain interval may lie above the value.

    Returns:
        Value and interval. The ends are quantiles of the resampled values (Efron's percentile method).
    """
    if not len(sums):
        return Interval(np.nan, np.nan, np.nan, 0)
    value = float(statistic(sums.sum(axis=0)))
    if len(sums) == 1:
        return Interval(value, np.nan, np.nan, 1)
    values = statistic(resample_sums(sums, resamples, seed))
    return Interval(value, *percentile_ends(values + (value - values.mean()) if centred else values), len(sums))


def clustered_accuracy(sums: np.ndarray) -> Interval:
    """Compute the share of right answers and its 95 % interval over groups.

    Resampling groups of equal share, e.g. where all answers are right, shows no spread: the ends are then those of
    :func:`wilson_ends`. ``sums`` ``(G, 2)`` are those of credit, from 0 to 1 for each answer, and of answers.
    """
    estimate = clustered_interval(sums)
    if len(sums) < 2 or np.ptp(ratio(sums)) > 0:
        return estimate
    low, high = wilson_ends(estimate.value, len(sums))
    return estimate._replace(low=low, high=high)


def wilson_ends(share: float, count: float) -> tuple[float, float]:
    r"""Return the ends of the 95 % score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    .. math:: \frac{p + z^2/2n \pm z\sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    Brown, Cai and DasGupta (2001, doi:10.1214/ss/1009213286) recommend the interval for small n.

    The count n is of independent trials, or of as many as trials that depend on each other are worth.
    """
    z = NormalDist().inv_cdf(ENDS[1])
    centre, spread = share + z**2 / (2 * count), z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((centre + side) / (1 + z**2 / count) for side in (-spread, spread))
    return max(0.0, min(float(low), share)), min(1.0, max(float(high), share))


def percentile_ends(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of values; NaN values, such as ratios with divisor 0, are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, ENDS)
    return float(low), float(high)


def resample_sums(sums: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draw G of G groups ``(G, K)`` with replacement, repeatedly; return total sums ``(resamples, K)`` float64."""
    rng = np.random.default_rng(seed)
    sums = np.asarray(sums, dtype=np.float64)
    kinds, counts = np.unique(sums, axis=0, return_counts=True)
    if 8 * len(kinds) < min(len(sums), MANY):  # counts of equal groups are multinomial: far fewer random numbers
        return rng.multinomial(len(sums), counts / len(sums), size=resamples) @ kinds
    if len(sums) > MANY:
        starts = np.arange(BUNDLES) * len(sums) // BUNDLES
        sums = np.add.reduceat(rng.permutation(sums), starts)
    rows = max(1, BLOCK // len(sums))
    return np.concatenate([_draw(sums, min(rows, resamples - n), rng) for n in range(0, resamples, rows)])


def _draw(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    groups = len(sums)
    times = np.empty((resamples, groups))
    for some in np.array_split(times, -(-times.size // DRAWN)):
        drawn = rng.integers(groups, size=some.shape, dtype=np.int64)
        drawn += groups * np.arange(len(some))[:, None]
        some[:] = np.bincount(drawn.ravel(), minlength=some.size).reshape(some.shape)
    return times @ sums


def clustered_mean(values: np.ndarray, groups: Sequence[str] | np.ndarray) -> Interval:
    """Compute the mean of ``(N,)`` values and its interval by resampling groups; NaN values are left out."""
    known = ~np.isnan(values)
    sums = group_sums(group_codes(groups)[known], values[known], np.ones(known.sum()))
    return clustered_interval(sums)


def bootstrap_interval(differences: Sequence[np.ndarray]) -> Interval:
    """Compute the mean of paired differences ``(N,)`` of each run, resampling runs, and prompts within each run."""
    rng = np.random.default_rng(0)
    runs = np.stack(differences)
    drawn = rng.integers(len(runs), size=(RESAMPLES, len(runs)))
    means = np.empty((RESAMPLES, len(runs)))
    for column in range(len(runs)):
        prompts = rng.integers(runs.shape[1], size=(RESAMPLES, runs.shape[1]))
        means[:, column] = runs[drawn[:, column, None], prompts].mean(axis=1)
    return Interval(float(runs.mean()), *percentile_ends(means.mean(axis=1)), runs.shape[1])
