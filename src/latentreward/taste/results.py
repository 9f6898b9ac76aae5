"""Result of a run: accuracy on held-out pairs with its interval, and what it says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from latentreward.errors import InputError
from latentreward.metrics.bootstrap import Interval
from latentreward.metrics.shared_pictures import picture_accuracy
from latentreward.reports.tables import with_interval
from latentreward.taste.pictures import number_of
from latentreward.taste.plan import PREFERENCES
from latentreward.taste.splitting import HELD_OUT

CHANCE = 0.5
SCORES = "scores_rank0.parquet"


@dataclass(frozen=True)
class ScoredPair:
    """Held-out pair that is no tie, with the scores of its pictures, means over the noise levels."""

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float

    @property
    def margin(self) -> float:
        """Score of the chosen picture minus that of the other."""
        return self.chosen_score - self.rejected_score


@dataclass(frozen=True)
class Measured:
    """Accuracy of a reward on held-out pairs.

    Attributes:
        pairs: Pairs, those with the largest margin first.
        accuracy: Share of pairs with the right order, with its 95 % interval; equal scores count ½.
        unscored: Number of held-out pairs without a score.
    """

    pairs: list[ScoredPair]
    accuracy: Interval
    unscored: int = 0

    @property
    def learned(self) -> bool:
        """Whether the whole interval lies above chance."""
        return bool(self.accuracy.low > CHANCE)

    def line(self) -> str:
        """Return the accuracy in one line."""
        worth, lost = "", f"; {self.unscored} more have no score" if self.unscored else ""
        if self.accuracy.groups != len(self.pairs):
            worth = f"; by their common pictures the pairs count as {self.accuracy.groups} independent ones"
        value = with_interval(self.accuracy._replace(groups=None))
        return (
            f"accuracy on {number_of(len(self.pairs), 'held-out pair')} in %: {value} "
            f"(95 % interval{worth}; chance is 50 %{lost})"
        )

    def verdict(self) -> str:
        """Say in one line whether the reward has learned something."""
        if self.learned:
            return "The reward orders new pairs better than chance."
        if self.accuracy.high < CHANCE:
            return "The reward orders new pairs worse than chance: in some pairs chosen and rejected may be exchanged."
        return (
            "Too little to learn from: the interval includes 50 %, so the reward may be no better than a coin; rate "
            "more pairs, or pictures that differ more clearly."
        )


def measure(scores: Path, data: Path) -> Measured:
    """Compute the accuracy from the scores of ``predict``.

    Raises:
        InputError: If no held-out pair besides ties has a score.
    """
    table = parquet.read_table(scores / SCORES).to_pydict()
    rows = [json.loads(line) for line in (data / PREFERENCES).read_text(encoding="utf-8").splitlines()]
    contents = {row["pair_id"]: row for row in rows}
    levels: dict[str, list[int]] = {}
    for place, pair_id in enumerate(table["pair_id"]):
        levels.setdefault(pair_id, []).append(place)
    pairs, links, sizes = [], [], []
    for pair_id, places in levels.items():
        row, label = contents[pair_id], table["label"][places[0]]
        if label == CHANCE:
            continue
        chosen, rejected = (
            float(np.mean([table[f"{side}_score"][n] for n in places])) for side in ("chosen", "rejected")
        )
        paths = table["chosen_key"][places[0]], table["rejected_key"][places[0]]
        won = label > CHANCE  # `chosen` is the first picture of a pair whose label lies between
        both = (*paths, chosen, rejected) if won else (*paths[::-1], rejected, chosen)
        pairs.append(ScoredPair(row["prompt"], *both))
        links.append((row["contents"][0], row["contents"][1]))
        sizes.append(pairs[-1].margin)
    if not pairs:
        raise InputError(
            "folder: no held-out pair besides ties has a score; see that their pictures are there, and run the same "
            "command again"
        )
    credit = (np.sign(sizes) + 1) / 2
    unscored = sum(row["split"] == HELD_OUT and row["pair_id"] not in levels for row in rows)
    return Measured(sorted(pairs, key=lambda pair: -pair.margin), picture_accuracy(credit, links), unscored)


def record(measured: Measured, told: Mapping[str, Any]) -> str:
    """Return the result as JSON."""
    names = ("value", "low", "high", "independent_pairs")
    accuracy = dict(zip(names, measured.accuracy, strict=True))
    content = {**told, "held_out": len(measured.pairs), "unscored": measured.unscored, "accuracy": accuracy}
    return json.dumps({**content, "learned": measured.learned}, indent=1, ensure_ascii=False) + "\n"
