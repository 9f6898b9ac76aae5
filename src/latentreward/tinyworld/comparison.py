"""Comparison of a tiny pipeline before and after alignment: pictures and their utilities."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from latentreward.core.reports.drawing import PLAIN, RIGHT, WRONG, draw_pair, tile
from latentreward.tinyworld.captions import judged_captions
from latentreward.tinyworld.oracle import mean_verdict, utility_scores
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline, quiet_libraries, sample_pictures

SIDE = 128
"""Side in pixels of a picture before and after the alignment."""


@dataclass(frozen=True)
class Judged:
    """Pictures of held-out captions, one per caption, with the judge's verdicts."""

    captions: list[str]  # n captions
    pictures: np.ndarray  # ``(N, 32, 32, 3)`` uint8
    utility: np.ndarray  # ``(N,)`` utilities by the judge (:mod:`latentreward.tinyworld.oracle`), 0 to 6
    verdict: dict[str, float]  # means over the pictures of ``alignment``, ``all_right``, ``quality`` and ``utility``


def judge_policy(pipeline: str, lora: Path | None, guidance_scale: float) -> Judged:
    """Sample one picture for each of 192 held-out captions with diffusers, and judge the pictures.

    The pipeline is ``sd_tiny`` or ``sd35_tiny``; ``lora`` is a folder for ``load_lora_weights``. A guidance scale of 1
    switches guidance off.
    """
    loaded = load_pipeline(PIPELINE_FOLDERS[pipeline])
    if lora is not None:
        with quiet_libraries():
            loaded.load_lora_weights(lora)
    captions = judged_captions()
    pictures = sample_pictures(loaded, captions, 1, guidance_scale=guidance_scale)
    return Judged(
        captions, pictures, utility_scores(captions, list(pictures)).numpy(), mean_verdict(captions, list(pictures))
    )


def before_and_after(before: Judged, after: Judged) -> Image.Image:
    """Show 12 captions with their pictures before and after the alignment, from equal noise, and the utility of both.

    The captions are evenly spaced in the order of their change in utility, so that none is picked by hand.
    """
    order = np.argsort(after.utility - before.utility, kind="stable")
    cells = []
    for place in order[np.linspace(0, len(order) - 1, 12).round().astype(int)]:
        pairs = [(judged.pictures[place], judged.utility[place]) for judged in (before, after)]
        pictures = [Image.fromarray(pixels).resize((SIDE, SIDE), Resampling.NEAREST) for pixels, _ in pairs]
        told = [f"{name} {utility:.2f}" for name, (_, utility) in zip(("before", "after"), pairs, strict=True)]
        change = round(float(pairs[1][1] - pairs[0][1]), 2)
        colour = PLAIN if change == 0 else RIGHT if change > 0 else WRONG
        cells.append(draw_pair(pictures, told, before.captions[place], colour))
    return tile(cells, 3)
