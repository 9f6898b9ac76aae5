"""Counts over a score table: how often a scorer contradicts the label, and what each filter strategy keeps."""

from collections import Counter
from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from latentreward.data.mpcf import MPCF, Comparison, Strategy, select_consistent
from latentreward.data.score_table import PairGaps
from latentreward.errors import InputError


@dataclass(frozen=True)
class ScorerCounts:
    """One scorer against the labels.

    Attributes:
        pairs: Pairs that one image won and that have a gap.
        below: Those whose chosen image scores below the rejected one.
        equal: Those whose images score the same.
        missing: Decided pairs and ties without a score.
        share_below: ``below`` / ``pairs``; None without pairs.
    """

    pairs: int
    below: int
    equal: int
    missing: int
    share_below: float | None


@dataclass(frozen=True)
class StrategyCounts:
    """What one filter keeps.

    Attributes:
        strategy: Published strategy.
        comparison: ``code`` (gaps above the floors) or ``paper`` (also gaps equal to them).
        decided: Pairs kept that one image won.
        ties: Ties kept, by the limits of the released code.
        dropped: Pairs dropped, by reason.
    """

    strategy: int
    comparison: str
    decided: int
    ties: int
    dropped: Counter[str]


@dataclass
class ScoreCounts:
    """A score table for the rows of one split.

    Attributes:
        rows: Rows of the split.
        problems: Rows of which the table says nothing, by reason.
        scorers: Counts by scorer.
        strategies: What each strategy keeps; empty if the table lacks a scorer of theirs.
        note: Why ``strategies`` is empty.
    """

    rows: int
    problems: dict[str, int]
    scorers: dict[str, ScorerCounts]
    strategies: list[StrategyCounts] = field(default_factory=list)
    note: str = ""


def inspect_scores(gaps: PairGaps) -> ScoreCounts:
    """Count what a table's gaps say about the labels, and what each strategy of MPCF keeps of the pairs.

    Args:
        gaps: Gaps of the rows of one split.
    """
    problems = {reason: int(rows.sum()) for reason, rows in gaps.problems.items() if rows.any()}
    sound = np.ones(len(gaps), dtype=bool)
    for rows in gaps.problems.values():
        sound &= ~rows
    scorers = {name: _count(values, sound, gaps.decided) for name, values in gaps.values.items()}
    counts = ScoreCounts(len(gaps), problems, scorers)
    try:
        for strategy in get_args(Strategy):
            for comparison in get_args(Comparison):
                keep, dropped = select_consistent(gaps, MPCF(strategy, comparison))
                kept = int((keep & gaps.decided).sum()), int((keep & ~gaps.decided).sum())
                counts.strategies.append(StrategyCounts(strategy, comparison, *kept, dropped))
    except InputError as error:
        counts.note = str(error)
    return counts


def _count(values: np.ndarray, sound: np.ndarray, decided: np.ndarray) -> ScorerCounts:
    known = sound & ~np.isnan(values)
    gaps = values[known & decided]
    below, equal, missing = (int(rows.sum()) for rows in (gaps < 0, gaps == 0, sound & ~known))
    return ScorerCounts(len(gaps), below, equal, missing, below / len(gaps) if len(gaps) else None)
