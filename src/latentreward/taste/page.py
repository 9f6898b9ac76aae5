"""Page of a run: accuracy, held-out pairs with their scores, and pictures before and after the alignment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.data.images import ImageError, decode_image
from latentreward.data.readers.json_rows import file_image
from latentreward.evaluation.policy.imported import find_pictures
from latentreward.reports import picture_uri, write_page
from latentreward.storage.durable import write_file
from latentreward.storage.json_files import read_config
from latentreward.taste.plan import Plan
from latentreward.taste.results import Measured, ScoredPair, record

HTML, JSON = "taste.html", "taste.json"
SHOWN = 24
"""Most held-out pairs on the page, at evenly spaced ranks of their margins."""
BEFORE_AFTER = {"before": "against", "after": "policy"}
"""Title → folder of the pictures, as ``evaluate-policy`` names it."""


def write_result(output: Path, plan: Plan, measured: Measured, how: str, judged: Path | None) -> Path:
    """Write ``taste.json`` and ``taste.html``; return the path of the page."""
    told = {"base": plan.base, "tuning": plan.tuning, "split": how}
    change = {} if judged is None else read_config(judged / "report.json")["comparisons"][0]["difference"]
    write_file(output / JSON, record(measured, {**told, "change": change} if change else told))
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
    """Take at most :data:`SHOWN` pairs at evenly spaced ranks, so that none is picked by hand."""
    places = np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).round().astype(int)
    return [pairs[place] for place in places]


def _card(folder: Path, pair: ScoredPair) -> dict[str, Any]:
    sides = (("chosen", pair.chosen, pair.chosen_score), ("rejected", pair.rejected, pair.rejected_score))
    return {
        "prompt": pair.prompt,
        "right": pair.margin > 0,
        "margin": f"{pair.margin:+.3f}",
        "pictures": [{"name": name, "uri": _uri(folder, path), "score": f"{score:.3f}"} for name, path, score in sides],
    }


def before_and_after(judged: Path) -> list[dict[str, Any]]:
    """Return the pictures before and after, in the order of the prompts."""
    folders = {title: judged / "pictures" / name for title, name in BEFORE_AFTER.items()}
    found = {title: {one.file: one for one in find_pictures(folder, None)} for title, folder in folders.items()}
    common = sorted(found["before"].keys() & found["after"].keys())
    return [
        {
            "prompt": found["before"][file].prompt,
            "pictures": [{"name": title, "uri": _uri(folder, file)} for title, folder in folders.items()],
        }
        for file in common
    ]


def _uri(folder: Path, path: str) -> str:
    """Return a picture's data URI; empty if it was removed meanwhile."""
    try:
        return picture_uri(decode_image(file_image(folder, path), exif="apply"), side=384)
    except ImageError:
        return ""
