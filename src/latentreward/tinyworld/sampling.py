"""Seeded sampling from the tiny pipelines in batches, and pictures before and after an alignment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling

from latentreward.core.reports.drawing import PLAIN, RIGHT, WRONG, draw_pair, tile
from latentreward.tinyworld.captions import judged_captions
from latentreward.tinyworld.oracle import mean_verdict, utility_scores

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

PIPELINE_FOLDERS = {name: Path(__file__).parent / "pipelines" / name for name in ("sd_tiny", "sd35_tiny")}
"""Folders of the pretrained pipelines that ship with the package, by name."""


def load_pipeline(folder: Path) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """Load a tiny pipeline in float32, without progress bars."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no pipeline in {folder}; make one with `make tinyworld` in a clone")
    with quiet_libraries():
        from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

        if (folder / "unet").is_dir():
            pipeline = StableDiffusionPipeline.from_pretrained(folder)
        else:
            pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars and log messages below errors of diffusers and transformers inside the block."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


@torch.no_grad()
def sample_pictures(
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seed: int,
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
) -> np.ndarray:
    """Sample one picture per prompt; the initial noise depends on the seed and the index in ``prompts`` alone.

    A guidance scale of 1 switches guidance off.

    Returns:
        Pictures ``(N, 32, 32, 3)``, uint8.
    """
    # Without T5 the pipeline would append max_sequence_length zero tokens, which the network never saw in training.
    special = {"max_sequence_length": 0} if hasattr(pipeline, "transformer") else {}
    pictures, size = [], 64
    for start in range(0, len(prompts), size):
        part = list(prompts[start : start + size])
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
        images = pipeline(
            part,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
            **special,
        ).images
        pictures.append(np.round(images * 255).astype(np.uint8))
    return np.concatenate(pictures)


SIDE = 128  # Side in pixels of a picture before and after the alignment


@dataclass(frozen=True)
class Judged:
    """Pictures of held-out captions, one per caption, with the judge's verdicts."""

    captions: list[str]  # n captions
    pictures: np.ndarray  # ``(N, 32, 32, 3)`` uint8
    utility: np.ndarray  # ``(N,)`` utilities by the judge (:mod:`latentreward.tinyworld.oracle`), 0 to 6
    verdict: dict[str, float]  # means over the pictures of ``alignment``, ``all_right``, ``quality`` and ``utility``


def judge_policy(pipeline: str, lora: Path | None, guidance_scale: float) -> Judged:
    """Sample a picture for each of 192 held-out captions by ``sd_tiny`` or ``sd35_tiny`` with a LoRA, and judge it."""
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
