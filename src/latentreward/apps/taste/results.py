"""Result of a run: accuracy on held-out pairs with its interval, what it says, and the page that shows it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from latentreward.apps.evaluation.policy.samples import find_pictures
from latentreward.apps.taste.pairs import number_of
from latentreward.apps.taste.plan import PREFERENCES, Plan
from latentreward.apps.taste.splitting import HELD_OUT
from latentreward.core.bootstrap import Interval
from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.core.reports.drawing import picture_uri
from latentreward.core.reports.page import write_page
from latentreward.core.reports.tables import with_interval
from latentreward.core.storage.durable import write_file
from latentreward.core.storage.json_files import read_config
from latentreward.data import ImageError, decode_image
from latentreward.data.images import file_image
from latentreward.reward.metrics.intervals import picture_accuracy

CHANCE = 0.5
SCORES = "scores_rank0.parquet"
HTML, JSON = "taste.html", "taste.json"
SHOWN = 24  # most held-out pairs on the page, at evenly spaced ranks of their margins
BEFORE_AFTER = {"before": "against", "after": "policy"}
"""Title → folder of the pictures, as ``evaluate-policy`` names it."""


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
    """Accuracy of a reward on held-out pairs."""

    pairs: list[ScoredPair]  # pairs, those with the largest margin first
    accuracy: Interval  # share of pairs with the right order, with its 95 % interval; equal scores count ½
    unscored: int = 0  # number of held-out pairs without a score

    @property
    def learned(self) -> bool:
        """Whether the whole interval lies above chance."""
        return bool(self.accuracy.low > CHANCE)

    def line(self) -> str:
        """Return the accuracy in one line."""
        told = f"accuracy on {number_of(len(self.pairs), 'held-out pair')} in %: "
        told += f"{with_interval(self.accuracy._replace(groups=None))} (95 % interval"
        if self.accuracy.groups != len(self.pairs):
            told += f"; by their common pictures the pairs count as {self.accuracy.groups} independent ones"
        lost = f"; {self.unscored} more have no score" if self.unscored else ""
        return f"{told}; chance is 50 %{lost})"

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
    """Compute the accuracy from the scores of ``predict``; raise InputError if no pair besides ties has a score."""
    table = parquet.read_table((scores / SCORES).absolute()).to_pydict()
    rows = [json.loads(line) for line in (data / PREFERENCES).read_text(encoding="utf-8").splitlines()]
    by_name = {row["pair_id"]: row for row in rows}
    levels: dict[str, list[int]] = {}
    for place, pair_id in enumerate(table["pair_id"]):
        levels.setdefault(pair_id, []).append(place)
    pairs, links = [], []
    for pair_id, places in levels.items():
        row, label = by_name[pair_id], table["label"][places[0]]
        if label == CHANCE:
            continue
        sides = [
            (table[f"{side}_key"][places[0]], float(np.mean([table[f"{side}_score"][n] for n in places])))
            for side in ("chosen", "rejected")
        ]
        # `chosen` is the first picture of a pair whose label lies between.
        (chosen, high), (rejected, low) = sides if label > CHANCE else reversed(sides)
        pairs.append(ScoredPair(row["prompt"], chosen, rejected, high, low))
        links.append((row["contents"][0], row["contents"][1]))
    if not pairs:
        raise InputError("folder: no held-out pair besides ties has a score; look for their pictures, and run it again")
    credit = (np.sign([pair.margin for pair in pairs]) + 1) / 2
    unscored = sum(row["split"] == HELD_OUT and row["pair_id"] not in levels for row in rows)
    return Measured(sorted(pairs, key=lambda pair: -pair.margin), picture_accuracy(credit, links), unscored)


def write_result(output: Path, plan: Plan, measured: Measured, how: str, judged: Path | None) -> Path:
    """Write ``taste.json`` and ``taste.html``; return the path of the page."""
    told = {"base": plan.base, "tuning": plan.tuning, "split": how}
    change = {} if judged is None else read_config(judged / "report.json")["comparisons"][0]["difference"]
    names = ("value", "low", "high", "independent_pairs")
    content = {
        **told,
        **({"change": change} if change else {}),
        "held_out": len(measured.pairs),
        "unscored": measured.unscored,
        "accuracy": dict(zip(names, measured.accuracy, strict=True)),
        "learned": measured.learned,
    }
    write_file(output / JSON, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_page(
        output / HTML,
        "taste",
        title=f"Own taste: {plan.folder.name}",
        line=measured.line(),
        verdict=measured.verdict(),
        learned=measured.learned,
        told=told,
        cards=[_card(plan.folder, pair) for pair in spread(measured.pairs)],
        pairs=len(measured.pairs),
        pictures=[] if judged is None else before_and_after(judged),
        change=change,
    )
    return output / HTML


def spread(pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
    """Take at most :data:`SHOWN` of the sorted pairs, at evenly spaced ranks, so that none is picked by hand."""
    places = np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).round().astype(int)
    return [pairs[place] for place in places]


def _card(folder: Path, pair: ScoredPair) -> dict[str, Any]:
    """Return what the page shows of a held-out pair."""
    sides = (("chosen", pair.chosen, pair.chosen_score), ("rejected", pair.rejected, pair.rejected_score))
    pictures = [
        {"name": name, "uri": uri, "score": f"{score:.3f}"}
        for (name, _, score), uri in zip(sides, _uris(file_image(folder, path) for _, path, _ in sides), strict=True)
    ]
    right, margin = pair.margin > 0, f"{pair.margin:+.3f}"
    return {"prompt": pair.prompt, "right": right, "margin": margin, "pictures": pictures}


def before_and_after(judged: Path) -> list[dict[str, Any]]:
    """Return the pictures before and after, in the order of the prompts."""
    folders = {title: judged / "pictures" / name for title, name in BEFORE_AFTER.items()}
    found = {title: {one.fields["file"]: one for one in find_pictures(folder)} for title, folder in folders.items()}
    cards = []
    for file in sorted(found["before"].keys() & found["after"].keys()):
        prompt, uris = found["before"][file].prompt, _uris(file_image(folder, file) for folder in folders.values())
        pictures = [{"name": title, "uri": uri} for title, uri in zip(folders, uris, strict=True)]
        cards.append({"prompt": prompt, "pictures": pictures})
    return cards


def _uris(images: Iterable[ImageRef]) -> list[str]:
    """Return pictures as data URIs, empty for one that was removed meanwhile."""
    uris = []
    for image in images:
        try:
            uris.append(picture_uri(decode_image(image, exif="apply"), side=384))
        except ImageError:
            uris.append("")
    return uris
