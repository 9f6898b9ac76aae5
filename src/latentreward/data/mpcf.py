"""Multi-preference consistent filtering: keep the pairs whose winner also wins by other scores (arXiv:2502.01051)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.contracts import PreferencePair
from latentreward.data.readers import OnError, PairReader, count_text
from latentreward.data.score_table import PairGaps, ScoreTable
from latentreward.errors import InputError, did_you_mean

Strategy = Literal[1, 2, 3]
Comparison = Literal["code", "paper"]
Ties = Literal["limits", "drop", "keep"]

AESTHETIC_FLOORS: dict[int, float] = {1: 0.0, 2: -0.5, 3: -1.0}
"""Least aesthetic gap by strategy; the other two scores must not prefer the loser in any of them."""
TIE_LIMITS = {"aesthetic": 0.2, "clipscore": 0.03, "vqascore": 0.07}
"""Gaps below which the released code keeps a tie: aesthetic points, cosine, probability."""


@dataclass(frozen=True)
class MPCF:
    """When a pair is kept.

    Attributes:
        strategy: Published preset: 1, 2 (what the released models were trained with) or 3 asks for an aesthetic gap of
            0, -0.5 or -1, and for a CLIP and a VQA gap of 0.
        comparison: ``"code"`` keeps gaps above these floors, as the released code does; ``"paper"`` also gaps equal to
            them.
        ties: ``"limits"`` keeps a tie whose gaps all lie below ``tie_limits``, ``"drop"`` none, ``"keep"`` all.
        floors: Floor by scorer, in place of the strategy's: which scorers apply, and from where on.
        tie_limits: Limit by scorer for ties; by default those of the released code for the scorers of ``floors``.

    Raises:
        InputError: If a setting is out of range, or a scorer of ``floors`` has no limit for ties.

    Note:
        The paper states the floors with ≥ and no rule for ties; the released code compares with >, and looks at the
        gaps of ties as they stand in its table, which are presumably absolute differences.
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
        if self.floors is not None and not self.floors:
            raise InputError("floors is empty, so nothing would be filtered; name a scorer, or leave it out")
        if self.ties == "limits" and (lacking := set(self.floors_in_use()) - set(self.limits_in_use())):
            raise InputError(f"tie_limits lacks {sorted(lacking)[0]!r}; add its limit, or set ties to drop or keep")

    def floors_in_use(self) -> dict[str, float]:
        """Floor by scorer."""
        if self.floors is not None:
            return dict(self.floors)
        return {"aesthetic": AESTHETIC_FLOORS[self.strategy], "clipscore": 0.0, "vqascore": 0.0}

    def limits_in_use(self) -> dict[str, float]:
        """Limit for ties by scorer."""
        if self.tie_limits is not None:
            return dict(self.tie_limits)
        return {name: TIE_LIMITS[name] for name in self.floors_in_use() if name in TIE_LIMITS}


def select_consistent(gaps: PairGaps, rule: MPCF) -> tuple[np.ndarray, Counter[str]]:
    """Which pairs a rule keeps.

    Args:
        gaps: Gaps of N pairs.
        rule: The rule.

    Returns:
        ``(N,)`` bool, and the number of dropped pairs by the first reason that applied: kept and dropped make N.

    Raises:
        InputError: If ``gaps`` lacks a scorer of the rule.
    """
    floors, limits = rule.floors_in_use(), rule.limits_in_use() if rule.ties == "limits" else {}
    for name in (*floors, *limits):
        if name not in gaps.values:
            raise InputError(
                f"the score table has no {name!r}{did_you_mean(name, gaps.values)}; "
                "set floors to the scorers that should count"
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


class FilteredReader(PairReader):
    """The rows of another reader that multi-preference consistent filtering keeps, in their order.

    Which rows stay is known when the object is constructed; ``skipped`` counts the others by reason. Nothing is
    decoded for it.

    Args:
        reader: Where pairs come from. If the table has no ``pair_id``, it must keep every row of its files.
        scores: Table of scores, see :class:`ScoreTable`.
        on_error: What happens to images that cannot be read, see :class:`PairReader`; as ``reader`` has it by default.
        rule: See :class:`MPCF`.

    Raises:
        InputError: If the table does not fit the reader or the settings, or no row is left.
    """

    def __init__(self, reader: PairReader, scores: str | Path, *, on_error: OnError | None = None, **rule: Any) -> None:
        super().__init__(on_error or reader.own_on_error, exif=reader.exif)
        self.reader, self.holds = reader, reader.holds
        self.rule = MPCF(**rule)
        keep, self.skipped = select_consistent(ScoreTable(scores).gaps(reader), self.rule)
        self.rows = np.flatnonzero(keep)
        if not len(self.rows):
            reasons = count_text(self.skipped)
            raise InputError(f"{scores}: none of {len(reader)} rows left ({reasons}); check the table and the floors")
        self.report(f"filtered by {scores}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PreferencePair:
        return self.reader[int(self.rows[index])]

    def labels(self) -> np.ndarray:
        """``(len,)`` float: ``label_a`` of every row that is left."""
        return self.reader.labels()[self.rows]

    def prompts(self) -> list[str]:
        """Raw prompt of every row that is left."""
        prompts = self.reader.prompts()
        return [prompts[row] for row in self.rows]

    def pair_ids(self) -> list[str]:
        """Name of every row that is left."""
        pair_ids = self.reader.pair_ids()
        return [pair_ids[row] for row in self.rows]

    def groups(self) -> list[str]:
        """Group of every row that is left."""
        groups = self.reader.groups()
        return [groups[row] for row in self.rows]

    def facts(self) -> dict[str, list[Any]]:
        """Facts of every row that is left."""
        return {name: [values[row] for row in self.rows] for name, values in self.reader.facts().items()}
