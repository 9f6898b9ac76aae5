"""The pairs that tell models apart, and the cards that show them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from latentreward.apps.evaluation.benchmark.base import BenchmarkPairs
from latentreward.core.contracts import sources_of
from latentreward.core.reports.drawing import picture_uri
from latentreward.core.reports.tables import Row
from latentreward.data import ImageError, PairReader, decode_image

SHOWN = 12
"""Most pairs of a split that are shown."""
LONGEST_PROMPT = 400
"""Most characters of a prompt shown on the page."""
Pictures = Mapping[tuple[str, int], Sequence[Image.Image | None]]
"""(data set and split, row) → images a and b, and the pictures that they edit; None for one that cannot be read."""


def most_disputed(scored: Sequence[BenchmarkPairs], count: int = SHOWN) -> list[Row]:
    """Return the pairs on which two scorers disagree most; with one scorer, the pairs on which it errs most.

    A gap g is the score of image a minus that of image b, in units of the scorer's root mean square gap. With several
    scorers, pairs are ranked by min(max g, −min g) over the scorers, which is positive where two scorers prefer
    different images. With one scorer, pairs are ranked by its gap in favour of the image that people did not prefer.
    At most one pair of each prompt group is returned.
    """
    gaps, first = np.stack([pairs.gap for pairs in scored]), scored[0]
    for number, own in enumerate(gaps):
        finite = own[np.isfinite(own)]
        typical = np.sqrt(np.mean(np.square(finite))) if len(finite) else 0.0
        gaps[number] = own / typical if typical > 0 else own
    if len(scored) == 1:
        tells = -gaps[0] * np.sign(first.labels - 0.5)
    else:
        known = np.nan_to_num(gaps, nan=0.0)
        tells = np.minimum(known.max(axis=0), -known.min(axis=0))
    tells = np.nan_to_num(tells, nan=0.0)
    rows: dict[str, Row] = {}
    for row in np.argsort(-tells, kind="stable").tolist():
        if len(rows) == count or tells[row] <= 0:
            break
        if first.groups[row] in rows:
            continue
        finite = [(pairs, gap) for pairs, gap in zip(scored, gaps[:, row].tolist(), strict=True) if np.isfinite(gap)]
        rows[first.groups[row]] = {
            "benchmark": first.benchmark,
            "row": row,
            "pair_id": first.pair_ids[row],
            "prompt": first.prompts[row],
            "label": None if np.isnan(first.labels[row]) else float(first.labels[row]),
            "scores": {pairs.scorer: (float(pairs.first[row]), float(pairs.second[row])) for pairs, _ in finite},
            "gaps": {pairs.scorer: gap for pairs, gap in finite},
        }
    return list(rows.values())


def pictures_of(telling: Iterable[Row], readers: Mapping[str, PairReader]) -> Pictures:
    """Read the images of pairs, and those that they edit; ``readers`` are those of data sets and splits."""

    def read(reader: PairReader, row: int) -> Iterable[Image.Image | None]:
        pair = reader[row]
        for image in (pair.image_a, pair.image_b, *sources_of(pair.prompt)):
            try:
                yield decode_image(image, exif=reader.exif)
            except ImageError:
                yield None

    return {(one["benchmark"], one["row"]): [*read(readers[one["benchmark"]], one["row"])] for one in telling}


def card(pair: Row, pictures: Pictures) -> dict[str, Any]:
    """Return the values of a pair's card: images, prompt, people's choice, and scores and gap of each model."""
    label = 0.5 if pair["label"] is None else pair["label"]
    left, right, *sources = map(_uri, pictures.get((pair["benchmark"], pair["row"]), (None, None)))
    sides = (("Left", left, label > 0.5), ("Right", right, label < 0.5))
    return {
        "pair_id": pair["pair_id"],
        "prompt": shortened(pair["prompt"], LONGEST_PROMPT),
        "people": preferred(pair["label"]),
        "sources": sources,
        "pictures": [
            {"uri": uri, "alt": f"{side} image of the pair, for the prompt below", "chosen": chosen}
            for side, uri, chosen in sides
        ],
        "rows": [
            {
                "scorer": scorer,
                "scores": [f"{score:.4g}" for score in pair["scores"][scorer]],
                "gap": f"{gap:+.2f}",
                "right": None if label == 0.5 else bool(gap * (label - 0.5) > 0),
            }
            for scorer, gap in pair["gaps"].items()
        ],
    }


def _uri(image: Image.Image | None) -> str | None:
    return None if image is None else picture_uri(image)


def shortened(text: str, length: int) -> str:
    """Return the first ``length`` characters of a text, with ``…`` where it was cut."""
    return text if len(text) <= length else f"{text[:length]}…"


def preferred(label: float | None) -> str:
    """Return in words which image people preferred; ``label`` is the probability of the left image."""
    if label is None:
        return "no label"
    if label == 0.5:
        return "tie"
    side = "left" if label > 0.5 else "right"
    return side if label in (0, 1) else f"{side} ({max(label, 1 - label):.0%})"
