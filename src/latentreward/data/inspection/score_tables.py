"""Counts over a score table: how often a scorer contradicts the label, and how many pairs each MPCF strategy keeps."""

from collections import Counter
from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from latentreward.data.mpcf import MPCF, Comparison, Strategy, select_consistent
from latentreward.data.score_table import PairGaps
from latentreward.errors import InputError


@dataclass(frozen=True)
class ScorerCounts:
    """Agreement of one scorer with the labels."""

    pairs: int  # decided pairs (not ties) that have a score gap
    below: int  # pairs of these whose chosen image scores below the rejected image
    equal: int  # pairs of these whose images have equal scores
    missing: int  # decided pairs and ties without a score
    share_below: float | None  # below / pairs; None if pairs is 0


@dataclass(frozen=True)
class StrategyCounts:
    """Numbers of pairs that one filter keeps and drops, see :class:`~latentreward.data.mpcf.MPCF`."""

    strategy: int  # number of the published strategy
    comparison: str  # code keeps gaps above the floors; paper also keeps gaps equal to the floors
    decided: int  # decided pairs (not ties) that are kept
    ties: int  # ties that are kept, by the limits of the released code
    dropped: Counter[str]  # dropped pairs by reason


@dataclass
class ScoreCounts:
    """Counts over a score table for the rows of one split."""

    rows: int  # of the split
    problems: dict[str, int]  # rows for which the table has no usable gap, by reason
    scorers: dict[str, ScorerCounts]
    strategies: list[StrategyCounts] = field(default_factory=list)  # empty if the table lacks one of their scorers
    note: str = ""  # reason why strategies is empty


def inspect_scores(gaps: PairGaps) -> ScoreCounts:
    """Count how each scorer agrees with the labels, and how many pairs each MPCF strategy keeps."""
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
