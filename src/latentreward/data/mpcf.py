"""Multi-preference consistent filtering: keep pairs whose winner also wins by other scores (MPCF, arXiv:2502.01051)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.core.errors import InputError, did_you_mean
from latentreward.data.readers.base import OnError, PairReader, count_text
from latentreward.data.score_table import PairGaps, ScoreTable
from latentreward.data.splits import ChosenRows

Strategy = Literal[1, 2, 3]
Comparison = Literal["code", "paper"]
Ties = Literal["limits", "drop", "keep"]

AESTHETIC_FLOORS: dict[int, float] = {1: 0.0, 2: -0.5, 3: -1.0}
"""Strategy → floor of the aesthetic gap; the floor of the CLIP and VQA gaps is 0 in all strategies."""
TIE_LIMITS = {"aesthetic": 0.2, "clipscore": 0.03, "vqascore": 0.07}
"""Scorer → gap below which the released code keeps a tie; in aesthetic points, cosine similarity and probability."""


@dataclass(frozen=True)
class MPCF:
    """Rule by which multi-preference consistent filtering keeps a pair.

    A decided pair is kept if each scorer's gap (score of the winner minus score of the loser) is above a floor. The
    scorers of the published strategies are ``aesthetic``, ``clipscore`` and ``vqascore``.

    Attributes:
        strategy: Published preset. The floor of the aesthetic gap is 0 (strategy 1), -0.5 (strategy 2, used for the
            released models) or -1 (strategy 3); the floor of the CLIP and VQA gaps is 0.
        comparison: ``"code"`` keeps gaps above the floor, as the released code does; ``"paper"`` also keeps gaps equal
            to the floor.
        ties: ``"limits"`` keeps a tie if all its gaps are below ``tie_limits``; ``"drop"`` drops all ties; ``"keep"``
            keeps all ties.
        floors: Scorer → floor, in place of the strategy's floors; only these scorers apply.
        tie_limits: Scorer → limit for the gap of a tie; by default the released code's limits for the scorers in use.

    Note:
        The paper compares with ≥ and states no rule for ties. The released code compares with >, and uses the gaps of
        ties from its table, which presumably are absolute differences.
    """

    strategy: Strategy = 2
    comparison: Comparison = "code"
    ties: Ties = "limits"
    floors: Mapping[str, float] | None = None
    tie_limits: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        choices = {"strategy": (1, 2, 3), "comparison": ("code", "paper"), "ties": ("limits", "drop", "keep")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(map(str, allowed))}")
        for name in ("floors", "tie_limits"):
            for scorer, value in (getattr(self, name) or {}).items():
                if not isinstance(value, float | int | np.number) or not np.isfinite(value):
                    raise InputError(f"{name}.{scorer} is {value!r}; give a finite number, in the scorer's unit")
        if self.floors is not None and not self.floors:
            raise InputError("floors is empty, so nothing would be filtered; name a scorer, or leave it out")
        if self.ties == "limits" and (lacking := set(self.floors_in_use()) - set(self.limits_in_use())):
            raise InputError(f"tie_limits lacks {sorted(lacking)[0]!r}; add its limit, or set ties to drop or keep")

    def floors_in_use(self) -> dict[str, float]:
        """Return scorer → floor: ``floors`` if set, else those of the strategy."""
        if self.floors is not None:
            return dict(self.floors)
        return {"aesthetic": AESTHETIC_FLOORS[self.strategy], "clipscore": 0.0, "vqascore": 0.0}

    def limits_in_use(self) -> dict[str, float]:
        """Return scorer → limit for ties: ``tie_limits`` if set, else those of the released code."""
        if self.tie_limits is not None:
            return dict(self.tie_limits)
        return {name: TIE_LIMITS[name] for name in self.floors_in_use() if name in TIE_LIMITS}


def select_consistent(gaps: PairGaps, rule: MPCF) -> tuple[np.ndarray, Counter[str]]:
    """Select the pairs that a rule keeps.

    Returns:
        ``(N,)`` bool, true for kept pairs; and the number of dropped pairs by reason, each pair counted under the
        first reason that applies.

    Raises:
        InputError: If ``gaps`` lacks a scorer of the rule.
    """
    floors, limits = rule.floors_in_use(), rule.limits_in_use() if rule.ties == "limits" else {}
    for name in (*floors, *limits):
        if name not in gaps.values:
            raise InputError(
                f"the score table has no {name!r}{did_you_mean(name, gaps.values)}; "
                "set FilteredReader's floors to the scorers that should count"
            )
    keep, dropped = np.ones(len(gaps), dtype=bool), Counter[str]()

    def drop(rows: np.ndarray, reason: str) -> None:
        if number := int((keep & rows).sum()):
            dropped[reason] += number
        keep[rows] = False

    for reason, rows in gaps.problems.items():
        drop(rows, reason)
    for name in dict.fromkeys((*floors, *limits)):
        drop(np.isnan(gaps.values[name]), f"{name} missing or NaN")
    for name, floor in floors.items():
        above = gaps.values[name] >= floor if rule.comparison == "paper" else gaps.values[name] > floor
        drop(gaps.decided & ~above, f"{name} gap too low")
    for name, limit in limits.items():
        drop(~gaps.decided & ~(gaps.values[name] < limit), f"{name} gap of a tie too large")
    if rule.ties == "drop":
        drop(~gaps.decided, "tie")
    return keep, dropped


class FilteredReader(ChosenRows):
    """Reader of the rows of another reader that multi-preference consistent filtering keeps, in their order.

    The constructor selects the rows from labels and scores, without decoding images. ``skipped`` counts the dropped
    rows by reason.

    Args:
        reader: Source of the pairs. If the table has no column ``pair_id``, the reader must keep every row of its
            files.
        scores: Path of the table of scores, see :class:`ScoreTable`.
        on_error: What happens to images that cannot be read, see :class:`PairReader`; by default as ``reader`` has it.
        rule: Settings of :class:`MPCF`.
    """

    def __init__(self, reader: PairReader, scores: str | Path, *, on_error: OnError | None = None, **rule: Any) -> None:
        self.rule = MPCF(**rule)
        keep, skipped = select_consistent(ScoreTable(scores).gaps(reader), self.rule)
        super().__init__(reader, np.flatnonzero(keep), on_error)
        self.skipped = skipped
        if not len(self.rows):
            reasons = count_text(self.skipped)
            raise InputError(f"{scores}: none of {len(reader)} rows left ({reasons}); check the table and the floors")
        self.report(f"filtered by {scores}")
