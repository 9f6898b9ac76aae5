"""Writer of a benchmark report as one HTML page."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentreward.contracts import ImageRef
from latentreward.data.images import ExifOrientation, ImageError, decode_image
from latentreward.data.readers import PairReader
from latentreward.evaluation.benchmark.plots import (
    Drawn,
    accuracy_figure,
    agreement_figures,
    calibration_figures,
    level_figures,
)
from latentreward.evaluation.benchmark.results import BenchmarkReport, Disagreement
from latentreward.evaluation.benchmark.sections import INTRODUCTION, disagreement_section, preferred, sections
from latentreward.reports import figure_uri, picture_uri, write_page
from latentreward.reports.tables import grouped

LONGEST_PROMPT = 400
"""Most characters of a prompt shown on the page."""
Pictures = Mapping[tuple[str, int], tuple[Image.Image | None, Image.Image | None]]
"""(data set, row) → the pair's two images, None for an image that cannot be read."""


def disagreement_pictures(report: BenchmarkReport, readers: Mapping[str, PairReader]) -> Pictures:
    """Read the images of the pairs in ``report.telling``."""
    pictures = {}
    for one in report.telling:
        reader = readers[one.benchmark]
        pair = reader[one.row]
        pictures[one.benchmark, one.row] = _decode(pair.image_a, reader.exif), _decode(pair.image_b, reader.exif)
    return pictures


def write_benchmark_page(path: Path, report: BenchmarkReport, pictures: Pictures) -> None:
    """Write the benchmark report as an HTML page."""
    parts = list(sections(report))
    figures: dict[str, list[dict[str, str]]] = {part.key: [] for part in parts}
    for key, (figure, alt) in _figures(report):
        figures[key].append({"uri": figure_uri(figure), "alt": alt})
    title, text, by_data = disagreement_section(report)
    telling = [(name, [_card(pair, pictures) for pair in pairs]) for name, pairs in by_data.items()]
    write_page(
        path,
        "benchmark",
        title="Benchmark of reward models",
        introduction=INTRODUCTION,
        notes=report.notes,
        sections=parts,
        figures=figures,
        telling=telling,
        telling_title=title,
        telling_text=text,
    )


def _figures(report: BenchmarkReport) -> Iterator[tuple[str, Drawn]]:
    """Yield the key of a section and a figure for that section."""
    published = grouped(report.published, "protocol")
    for (protocol, benchmark), results in grouped(report.protocols, "protocol", "benchmark").items():
        if any(np.isfinite(result.estimate.value) for result in results):
            yield f"accuracy-{protocol}-{benchmark}", accuracy_figure(results, published.get((protocol,), []))
    groups = {"levels": level_figures, "calibration": calibration_figures, "agreement": agreement_figures}
    for key, draw in groups.items():
        yield from ((key, drawn) for drawn in draw(report))


def _card(pair: Disagreement, pictures: Pictures) -> dict[str, Any]:
    left, right = pictures.get((pair.benchmark, pair.row), (None, None))
    sides = (("Left", left, 0.5), ("Right", right, -0.5))
    label = 0.5 if pair.label is None else pair.label
    long = len(pair.prompt) > LONGEST_PROMPT
    return {
        "pair_id": pair.pair_id,
        "prompt": f"{pair.prompt[:LONGEST_PROMPT]}…" if long else pair.prompt,
        "people": preferred(pair.label),
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
                "first": f"{pair.scores[scorer][0]:.4g}",
                "second": f"{pair.scores[scorer][1]:.4g}",
                "gap": f"{gap:+.2f}",
                "right": None if label == 0.5 else bool(gap * (label - 0.5) > 0),
            }
            for scorer, gap in pair.gaps.items()
        ],
    }


def _decode(image: ImageRef, exif: ExifOrientation) -> Image.Image | None:
    try:
        return decode_image(image, exif=exif)
    except ImageError:
        return None
