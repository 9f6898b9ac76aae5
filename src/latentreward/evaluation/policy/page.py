"""Pictures of both policies side by side, for the HTML page."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latentreward.contracts import ImageRef
from latentreward.data.images import decode_image
from latentreward.evaluation.policy.results import ScoredPictures
from latentreward.evaluation.policy.sections import number, signed
from latentreward.reports import picture_uri

SIDE = 256
"""Longest side of a picture on the page, in pixels."""


def side_by_side(scored: Sequence[ScoredPictures], cards: int) -> dict[str, Any]:
    """Return the values of the page's template for one policy, or two with pictures of the same prompts and numbers.

    At most ``cards`` pictures of each policy are chosen, at evenly spaced ranks of the difference of the two policies'
    first score (with one policy, of the first score).
    """
    names = list(scored[0].scores)
    rows = shown_rows(scored, cards)
    groups = sorted({scored[0].pictures[row].group for row in rows} - {""})
    return {
        "policies": [policy.policy for policy in scored],
        "scores": names,
        "groups": groups,
        "cards": [_card(row, scored, names, groups) for row in rows],
        "pictures": len(scored[0].pictures),
    }


def shown_rows(scored: Sequence[ScoredPictures], cards: int) -> list[int]:
    """Return the rows of the pictures to show, in ascending order."""
    count = len(scored[0].pictures)
    order = np.argsort(_sort_values(scored, next(iter(scored[0].scores))), kind="stable")
    chosen = np.linspace(0, count - 1, min(cards, count)).round().astype(int)
    return sorted(order[chosen].tolist())


def _sort_values(scored: Sequence[ScoredPictures], name: str) -> np.ndarray:
    """Return ``(N,)``: the first policy's score minus the second's; with one policy, the score itself."""
    first = scored[0].scores[name]
    return first - scored[1].scores[name] if len(scored) > 1 else first


def _card(row: int, scored: Sequence[ScoredPictures], names: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
    picture, rows, several = scored[0].pictures[row], [], len(scored) > 1
    gaps = {name: _sort_values(scored, name)[row] for name in names}
    for name, gap in gaps.items():
        values = [number(policy.scores[name][row]) for policy in scored]
        verdict = "good" if gap > 0 else "bad" if gap < 0 else ""
        compared = {"gap": signed(gap), "verdict": verdict} if several else {"gap": "", "verdict": ""}
        rows.append({"name": name, "values": values, **compared})
    files = [(policy.policy, policy.pictures[row]) for policy in scored]
    return {
        "prompt": picture.prompt,
        "group": picture.group,
        "group_number": groups.index(picture.group) if picture.group else -1,
        "number": f"{picture.place} / {picture.image}",
        "pictures": [
            {"policy": name, "uri": picture_uri(decode_image(ImageRef(file.file, path=file.path)), SIDE)}
            for name, file in files
        ],
        "rows": rows,
        "sort": [f"{gap:.8g}" for gap in gaps.values()],
    }
