"""Verdicts on claims: intervals of a difference over seeds and items, against the side of the paper."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latentreward.errors import InputError
from latentreward.metrics.bootstrap import Interval, crossed_interval, student_interval
from tools.reproduction.measuring import Values
from tools.reproduction.results import Result
from tools.reproduction.rows import Claim, Row

Word = Literal["holds", "does not hold", "undecided", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """What the measured numbers say about a claim.

    Attributes:
        word: ``holds`` if both intervals lie wholly on the claim's side, ``does not hold`` if both lie wholly on the
            other side, else ``undecided``; ``not measured`` with fewer than two seeds.
        difference: Difference of the two sides, with the interval over resampled seeds and items.
        over_seeds: The same difference, with Student's t interval over seeds.
    """

    word: Word
    difference: Interval
    over_seeds: Interval


UNKNOWN = Interval(np.nan, np.nan, np.nan)


def judge_claim(claim: Claim, results: Sequence[Result], row: Row) -> Verdict:
    """Judge a claim by the results of a row's seeds.

    Raises:
        InputError: If the two sides, or the seeds, were measured on different items.
    """
    if len(results) < 2:
        return Verdict("not measured", UNKNOWN, UNKNOWN)
    differences, items = [], set()
    for result in results:
        higher = result.values(claim.higher)
        lower = (
            Values(higher.items, np.zeros_like(higher.values)) if claim.lower is None else result.values(claim.lower)
        )
        if lower.items != higher.items:
            raise InputError(f"{row.name}: {claim.says!r} compares different items; give both sides the same ones")
        differences.append(higher.values - lower.values)
        items.add(higher.items)
    if len(items) > 1:
        raise InputError(f"{row.name}: its seeds were measured on different items; measure them again with --stale")
    return judge(np.stack(differences), claim.more_than)


def judge(differences: np.ndarray, more_than: float = 0.0) -> Verdict:
    """Judge whether a mean difference exceeds ``more_than``.

    ``differences`` ``(seeds, items)`` are those of the side that should be higher minus the other.
    """
    intervals = crossed_interval(differences), student_interval(differences.mean(axis=1).tolist())
    word: Word = "undecided"
    if all(one.low > more_than for one in intervals):
        word = "holds"
    elif all(one.high < more_than for one in intervals):
        word = "does not hold"
    return Verdict(word, *intervals)
