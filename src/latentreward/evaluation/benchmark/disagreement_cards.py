"""Pairs on which models disagree, with their pictures, for the HTML page of a benchmark."""

from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from latentreward.contracts import ImageRef
from latentreward.data.images import ExifOrientation, ImageError, decode_image
from latentreward.data.readers import PairReader
from latentreward.reports import picture_uri
from latentreward.reports.tables import Row

LONGEST_PROMPT = 400
"""Most characters of a prompt shown on the page."""
Pictures = Mapping[tuple[str, int], tuple[Image.Image | None, Image.Image | None]]
"""(data set and split, row) → the pair's two images, None for an image that cannot be read."""


def disagreement_pictures(telling: Iterable[Row], readers: Mapping[str, PairReader]) -> Pictures:
    """Read the images of pairs; ``readers`` are those of data sets and splits."""
    pictures = {}
    for row in telling:
        reader = readers[row["benchmark"]]
        pair = reader[row["row"]]
        images = _decode(pair.image_a, reader.exif), _decode(pair.image_b, reader.exif)
        pictures[row["benchmark"], row["row"]] = images
    return pictures


def disagreement_card(pair: Row, pictures: Pictures) -> dict[str, Any]:
    """Return the values of a pair's card: images, prompt, people's choice, and scores and gap of each model."""
    label = 0.5 if pair["label"] is None else pair["label"]
    sides = zip(("Left", "Right"), pictures.get((pair["benchmark"], pair["row"]), (None, None)), (1, -1), strict=True)
    prompt = pair["prompt"]
    return {
        "pair_id": pair["pair_id"],
        "prompt": f"{prompt[:LONGEST_PROMPT]}…" if len(prompt) > LONGEST_PROMPT else prompt,
        "people": preferred(pair["label"]),
        "pictures": [
            {
                "uri": None if image is None else picture_uri(image),
                "alt": f"{side} image of the pair, for the prompt below",
                "chosen": (label - 0.5) * sign > 0,
            }
            for side, image, sign in sides
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


def preferred(label: float | None) -> str:
    """Return in words which image people preferred; ``label`` is the probability of the left image."""
    if label is None:
        return "no label"
    if label == 0.5:
        return "tie"
    side = "left" if label > 0.5 else "right"
    return side if label in (0, 1) else f"{side} ({max(label, 1 - label):.0%})"


def _decode(image: ImageRef, exif: ExifOrientation) -> Image.Image | None:
    try:
        return decode_image(image, exif=exif)
    except ImageError:
        return None
