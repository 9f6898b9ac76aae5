"""Verdicts on claims that stay valid while seeds are added, and the discoveries among them that are not chance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import atan, cos, pi, sin, sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np

from latentreward.core.bootstrap import RESAMPLES, Interval, resample_sums
from tools.reproduction.rows import LEAST_SEEDS

FIRST_LEVEL = 0.02
"""Two-sided level of a row's first look: at seeds that share their pairs or, without such, at three repetitions."""
LEVELS = (0.0018, 0.0017, 0.0024, 0.0033, 0.0044, 0.0058, 0.0074, 0.0092, 0.0112, 0.0136)
"""Two-sided level of the intervals of n = 3, 4, … 12 whole repetitions, judged after every one.

A claim is judged again whenever a repetition is added, and no more are added once it is decided. The intervals are
therefore repeated confidence intervals (Jennison and Turnbull 1989, doi:10.1111/j.2517-6161.1989.tb01433.x): all looks
at whole repetitions together err with a probability of 3 %, spent as 3 % · (n/12)² (Kim and DeMets 1987,
doi:10.1093/biomet/74.1.149), and the first look of a row with 2 %. The levels of Student's t were found by simulation
(``tools.reproduction.power``), since the sequence of t has no unknown parameter.

That there is no difference is said by two one-sided tests at the same level (Schuirmann 1987, doi:10.1007/BF01068419):
a true difference of the margin or more lies on one side, so only one of them can err.
"""
ONCE_LEVEL = 0.03
"""Two-sided level of a single look at whole repetitions, with the error that a first look left of 5 %."""
SHRINKS = 0.94
"""Exponent of a p value: a look's p value divided by its level is below u, at any look, with probability 5 % · u^0.94.

It was found by simulation, and holds for all u up to 1, where it is exact.
"""
RATE = 0.05
"""False discovery rate."""
FARTHEST = 100
"""Number of repetitions up to which a row says how many would decide a claim."""
Word = Literal["holds", "does not hold", "no difference", "open", "not measured"]


@dataclass(frozen=True)
class Sample:
    """Paired differences of the two sides of a claim, minus what they should exceed."""

    differences: np.ndarray  # ``(repetitions, items)`` float64
    whole: bool = True  # whether repetitions have training pairs of their own; otherwise all have the same
    looked: bool = True  # whether whole repetitions follow seeds that were judged before them
    once: bool = False  # whether whole repetitions are judged at this look alone

    @property
    def level(self) -> float:
        """Two-sided level of the intervals."""
        if self.once:
            return ONCE_LEVEL
        return level(len(self.differences), self.looked) if self.whole else FIRST_LEVEL

    @cached_property
    def means(self) -> np.ndarray:
        """Mean difference of each repetition."""
        return np.asarray(self.differences.mean(axis=1))

    @property
    def spread(self) -> float:
        """Standard deviation of a repetition's mean difference."""
        return float(np.std(self.means, ddof=1))

    @property
    def alike(self) -> bool:
        """Whether all repetitions have one mean, so that nothing is known of their spread."""
        return bool(np.ptp(self.means) < 1e-9)

    @property
    def items_error(self) -> float:
        """Standard error of the mean difference that more repetitions do not reduce: that of the items."""
        return float(np.std(self.differences.mean(axis=0)) / sqrt(self.differences.shape[1]))

    @cached_property
    def drawn(self) -> np.ndarray:
        """Mean differences over resampled repetitions and items."""
        return crossed_means(self.differences)

    def p_value(self, value: float, sides: Literal[1, 2] = 2) -> float:
        """Compute the p value of a mean difference of ``value``, valid for all looks; the larger of both intervals'.

        It is below 5 % if both intervals exclude the value, up to the error of the resampling. With one side it is that
        of a difference of ``value`` or beyond.
        """
        if self.alike:
            return 1.0
        student = tail(float(self.means.mean() - value) / self.spread * sqrt(len(self.means)), len(self.means) - 1)
        beyond = min(np.sum(self.drawn <= value), np.sum(self.drawn >= value))
        crossed = 2 * (1 + float(beyond)) / (1 + len(self.drawn))
        return min(1.0, RATE * (max(student, crossed) / 2 * sides / self.level) ** SHRINKS)

    def intervals(self, level: float) -> tuple[Interval, Interval]:
        """Compute the intervals of the mean difference over resampled repetitions and items, and by Student's t."""
        low, high = np.quantile(self.drawn, (level / 2, 1 - level / 2)).tolist()
        crossed = Interval(float(self.means.mean()), low, high, self.differences.shape[1])
        return crossed, student_interval(self.means.tolist(), level)

    @property
    def counts(self) -> int:
        """Number of whole repetitions that the sample counts as: seeds that share their pairs are one together."""
        return len(self.differences) if self.whole else 1

    def needed(self, margin: float) -> int | None:
        """Return how many further whole repetitions would decide the claim if mean and spread stayed; None if many."""
        now, mean = self.counts, abs(float(self.means.mean()))
        for number in () if self.alike or self.once else range(max(now + 1, LEAST_SEEDS), FARTHEST + 1):
            if mean > self.half_width(number) or mean + self.half_width(number, sides=1) < margin:
                return number - now
        return None

    def half_width(self, repetitions: int, sides: Literal[1, 2] = 2) -> float:
        """Return the larger half of both intervals that is to be expected of so many whole repetitions.

        With one side it is the distance at which a one-sided test of the level excludes a value.
        """
        at, error = level(repetitions, self.looked) * 2 / sides, self.spread / sqrt(repetitions)
        crossed = NormalDist().inv_cdf(1 - at / 2) * sqrt(error**2 * (1 - 1 / repetitions) + self.items_error**2)
        return max(critical(at, repetitions - 1) * error, crossed)


@dataclass(frozen=True)
class Verdict:
    """What the measured numbers say about a claim.

    It holds if both intervals lie wholly on the claim's side, and does not hold if both lie wholly on the other side.
    There is no difference that matters if, at twice the level, both lie within the margin around what should be
    exceeded.
    """

    word: Word
    difference: Interval  # of the two sides, over resampled repetitions and items
    over_seeds: Interval  # of the same difference, by Student's t over repetitions
    whole: bool = False  # whether the intervals cover the draw of training pairs
    p_difference: float = 1.0  # p value of no difference, or of just what should be exceeded
    p_margin: float = 1.0  # p value of a difference at least as large as the margin
    needed: int | None = None  # further repetitions that would decide an open claim; None if over 100 or decided
    counts: int = 0  # whole repetitions that were judged, as of :class:`Sample`
    slight: bool = False  # whether the difference is shown to be within the margin
    survives: bool = True  # whether a decision is among the discoveries of the section
    # 1 or -1 if the first interval at a plain 95 %, and the means of all repetitions, lie on one side; else 0.
    leans: int = 0


UNKNOWN = Interval(np.nan, np.nan, np.nan)


def judge(sample: Sample, margin: float, more_than: float = 0.0) -> Verdict:
    """Judge whether a mean difference exceeds ``more_than``, of which ``sample`` has the excess.

    It is open if all repetitions have one mean, which shows no spread.
    """
    crossed, student = sample.intervals(sample.level)
    within = all(-margin < one.low and one.high < margin for one in sample.intervals(2 * sample.level))
    word: Word = "no difference" if within else "open"
    if all(one.low > 0 for one in (crossed, student)):
        word = "holds"
    elif all(one.high < 0 for one in (crossed, student)):
        word = "does not hold"
    if sample.alike:
        word, within = "open", False
    plain, _ = sample.intervals(0.05)
    sides = {*np.sign([plain.low, plain.high, *sample.means]).tolist()}
    difference, over_seeds = (
        one._replace(value=one.value + more_than, low=one.low + more_than, high=one.high + more_than)
        for one in (crossed, student)
    )
    return Verdict(
        word,
        difference,
        over_seeds,
        sample.whole,
        sample.p_value(0.0),
        max(sample.p_value(end, sides=1) for end in (-margin, margin)) if abs(crossed.value) < margin else 1.0,
        sample.needed(margin) if word == "open" else None,
        sample.counts,
        within,
        leans=int(sides.pop()) if len(sides) == 1 and not sample.alike else 0,
    )


def level(repetitions: int, looked: bool = True) -> float:
    """Return the two-sided level of the look at so many whole repetitions; beyond the last, that of the last.

    If seeds that share their pairs were not ``looked`` at, the first look is that at the fewest repetitions.
    """
    if repetitions == LEAST_SEEDS and not looked:
        return FIRST_LEVEL
    return LEVELS[min(repetitions - LEAST_SEEDS, len(LEVELS) - 1)]


def crossed_means(differences: np.ndarray) -> np.ndarray:
    """Resample repetitions and items, and return the mean of each resample, ``(resamples,)``.

    Every repetition is measured on the same items, so one draw of items serves all repetitions of a resample (unlike
    :func:`bootstrap_interval`, which draws items anew within each run). With one repetition only items are resampled.
    """
    runs, items = differences.shape
    # The number of drawn items is counted, because bundles of items may differ in size.
    sums = resample_sums(np.column_stack([differences.T, np.ones(items)]))
    means = sums[:, :-1] / sums[:, -1:]
    drawn = np.random.default_rng(1).integers(runs, size=(RESAMPLES, runs))
    return np.asarray(np.take_along_axis(means, drawn, axis=1).mean(axis=1))


def student_interval(means: Sequence[float], level: float) -> Interval:
    """Compute the mean over repetitions and its interval by Student's t, which includes the variation between them.

    There is one mean per repetition; the ends are NaN with one. The interval is also valid if the variances differ, as
    that of the mean of seeds with the same pairs does (Ibragimov and Müller 2010, doi:10.1198/jbes.2009.08046).
    """
    value = float(np.mean(means))
    if len(means) < 2:
        return Interval(value, np.nan, np.nan, len(means))
    half = critical(level, len(means) - 1) * float(np.std(means, ddof=1)) / sqrt(len(means))
    return Interval(value, value - half, value + half, len(means))


def tail(t: float, degrees: int) -> float:
    """Return the probability that Student's t with so many degrees of freedom lies beyond ``t`` on either side.

    The sums are 26.7.3 and 26.7.4 of Abramowitz and Stegun's Handbook of Mathematical Functions.
    """
    angle = atan(abs(t) / sqrt(degrees))
    odd = degrees % 2
    total = term = (cos(angle) if degrees > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, degrees, 2):
        term *= cos(angle) ** 2 * (k - 1) / k
        total += term
    inside = 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
    return max(0.0, 1 - inside)


@cache
def critical(level: float, degrees: int) -> float:
    """Return the value beyond which Student's t lies, on either side, with a probability of ``level``."""
    low, high = 0.0, 1.0
    while tail(high, degrees) > level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, degrees) > level else (low, middle)
    return high


def with_discoveries(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Mark the verdicts of a section by whether they survive a false discovery rate of 5 %.

    Each claim has two hypotheses, of no difference and of one of at least the margin. At most one of the two is true.
    """
    both = [p for one in verdicts if one.word != "not measured" for p in (one.p_difference, one.p_margin)]
    most = largest_discovery(both, len(both) // 2)
    return [
        replace(one, survives=(one.p_margin if one.word == "no difference" else one.p_difference) <= most)
        for one in verdicts
    ]


def largest_discovery(p_values: Sequence[float], true: int) -> float:
    """Return the largest p value that is rejected at a false discovery rate of 5 %; 0 if none is.

    It is the procedure of Benjamini and Hochberg (1995, doi:10.1111/j.2517-6161.1995.tb02031.x), for independent tests
    and for those that depend positively on each other, as tests that share a base run do. At most ``true`` of the
    hypotheses are true; if all may be, that is their number.
    """
    ranked = sorted(p_values)
    return max((p for rank, p in enumerate(ranked, 1) if p <= RATE * rank / true), default=0.0)
