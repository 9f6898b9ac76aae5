"""What alignment changed: pictures of a tiny pipeline with and without an adapter, their utilities."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentreward.tinyworld.captions import held_out_captions
from latentreward.tinyworld.oracle import mean_verdict, utility_scores
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline, quiet_libraries, sample_pictures


@dataclass(frozen=True)
class Judged:
    """Pictures of held-out captions, one each.

    Attributes:
        captions: N captions.
        pictures: ``(N, 32, 32, 3)`` uint8.
        utility: ``(N,)`` the judge's utilities, 0 to 6.
        verdict: Means of what the judge looks at: alignment, all attributes right, quality.
    """

    captions: list[str]
    pictures: np.ndarray
    utility: np.ndarray
    verdict: dict[str, float]


def judge_policy(pipeline: str, lora: Path | None, guidance_scale: float) -> Judged:
    """Sample one picture for each of 192 held-out captions, as diffusers would, and judge it.

    Args:
        pipeline: ``sd_tiny`` or ``sd35_tiny``.
        lora: Folder of the adapter, as ``load_lora_weights`` takes it; None for the pipeline as it ships.
        guidance_scale: Classifier-free guidance.
    """
    loaded = load_pipeline(PIPELINE_FOLDERS[pipeline])
    if lora is not None:
        with quiet_libraries():
            loaded.load_lora_weights(lora)
    captions = held_out_captions(192, 11)
    pictures = sample_pictures(loaded, captions, 1, guidance_scale=guidance_scale)
    return Judged(
        captions, pictures, utility_scores(captions, list(pictures)).numpy(), mean_verdict(captions, list(pictures))
    )


def before_and_after(before: Judged, after: Judged) -> Image.Image:
    """Two rows of pictures of the same captions and noise: above before, below after alignment.

    The captions are spread evenly over those whose utility changed most to least, so that nothing is picked by hand.
    """
    order = np.argsort(after.utility - before.utility)
    shown = order[np.linspace(0, len(order) - 1, 12).round().astype(int)]
    rows = [np.concatenate(list(judged.pictures[shown]), axis=1) for judged in (before, after)]
    gap = np.full((2, rows[0].shape[1], 3), 255, np.uint8)
    picture = Image.fromarray(np.concatenate([rows[0], gap, rows[1]]))
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
