"""Preference pairs of the tiny world: two pictures for one caption, their utilities, and a label."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import ne
from typing import Any

import numpy as np
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.tinyworld.captions import all_captions, caption_splits, draw_caption, parse_caption
from latentreward.tinyworld.oracle import judge
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline, sample_pictures
from latentreward.tinyworld.scenes import draw_label, draw_scene, picture_utility, render, scene_alignment


@dataclass(frozen=True)
class Sketch:
    """Picture that may be drawn for a caption, and the parts of its utility."""

    alignment: float  # share of the caption that the picture gets right, in [0, 1]
    quality: float  # in [0, 1]
    draw: Callable[[], np.ndarray]  # returns the picture, ``(32, 32, 3)`` uint8


class World:
    """The drawn shapes; a subclass has captions and pictures of its own.

    Attributes:
        settings: What the pictures of a subclass depend on, kept beside pairs; empty for the shapes.
        noiseless: Splits whose labels have no noise.
    """

    settings: str = ""
    noiseless: Sequence[str] = ()

    def draw_caption(self, rng: np.random.Generator, split: str) -> Any:
        """Draw a caption of a split, an object with a ``text``."""
        return draw_caption(rng, split)

    def sketch(self, caption: Any, rng: np.random.Generator, **shares: Any) -> Sketch:
        """Draw what a picture for a caption shows; ``shares`` are those of :func:`draw_scene`."""
        scene = draw_scene(caption, rng, **shares)
        return Sketch(scene_alignment(caption, scene), scene.nuisances.quality, lambda: render(scene))


JPEG_QUALITY = 95
GENERATED_GAP = 0.3  # Smallest utility gap of a pair of generated pictures; a smaller gap could be the judge's error


@dataclass(frozen=True)
class Picture:
    """An encoded picture."""

    uid: str  # UUID of the picture, the same in all pairs with the picture
    jpeg: bytes  # JPEG bytes
    model: str  # name of the generator: ``drawn``, ``sd_tiny`` or ``sd35_tiny``
    alignment: float  # share of the pair's caption's attributes that the picture gets right, in [0, 1]
    quality: float  # quality in [0, 1]

    @property
    def utility(self) -> float:
        """Utility for the pair's caption, 0 to 6, without label noise."""
        return picture_utility(self.alignment, self.quality)


@dataclass(frozen=True)
class Mixed:
    """Shares of pairs whose winner is worse in one part of the utility, independent of each other.

    The defaults are those of Pick-a-Pic by arXiv:2502.01051 (of a lower aesthetic, and of a lower CLIP or VQA score).
    """

    quality: float = 0.5
    alignment: float = 0.4


@dataclass(frozen=True)
class Pair:
    """Two pictures for a caption; ``label`` is 1.0 if the first is preferred, 0.0 if the second, 0.5 for a tie."""

    caption: str
    first: Picture
    second: Picture
    label: float


def draw_pairs(
    split: str,
    number: int,
    rng: np.random.Generator,
    unique: bool = False,
    ties: bool = True,
    mixed: Mixed | None = None,
    world: World | None = None,
) -> list[Pair]:
    """Make random pairs of drawn pictures with noisy labels; a world may have splits without noise.

    Args:
        split: Captions to draw from: ``train``, ``validation`` or ``test``.
        number: Number of pairs.
        rng: Random number generator.
        unique: Whether every pair has a caption of its own; of the shapes alone.
        ties: Whether to keep pairs with a tie as label, in place of other ones.
        mixed: Shares of winners that are worse in one part of the utility, without ties. By default pairs are kept as
            they are drawn: about 20 % of the winners have less quality, 15 % less alignment.
        world: World of captions and pictures; the shapes if None.
    """
    world = world or World()
    available = sum(map(len, caption_splits()[split].values()))
    if unique and number > available:
        raise InputError(f"cannot draw {number} pairs with captions of their own: split {split!r} has {available}")
    pairs: list[Pair] = []
    seen: set[str] = set()
    while len(pairs) < number:
        caption = world.draw_caption(rng, split)
        if unique and caption.text in seen:
            continue
        if mixed is None:
            first, second = (_picture(world.sketch(caption, rng), rng) for _ in range(2))
            label = draw_label(first.utility, second.utility, None if split in world.noiseless else rng)
        else:
            first, second, label = _draw_mixed(world, caption, mixed, rng)
        if label != 0.5 or ties:
            pairs.append(Pair(caption.text, first, second, label))
            seen.add(caption.text)
    return pairs


def _picture(sketch: Sketch, rng: np.random.Generator) -> Picture:
    return Picture(_draw_uid(rng), encode_jpeg(sketch.draw()), "drawn", sketch.alignment, sketch.quality)


def _draw_mixed(world: World, caption: Any, mixed: Mixed, rng: np.random.Generator) -> tuple[Picture, Picture, float]:
    """Draw pairs until the winner is worse in just the parts drawn for it; return the pictures and label."""
    worse = rng.random() < mixed.quality, rng.random() < mixed.alignment
    while True:
        first, second = world.sketch(caption, rng), world.sketch(caption, rng)
        parts = [(sketch.quality, sketch.alignment) for sketch in (first, second)]
        utilities = [picture_utility(one.alignment, one.quality) for one in (first, second)]
        label = draw_label(utilities[0], utilities[1], rng)
        winner, loser = parts if label == 1.0 else parts[::-1]
        if label != 0.5 and tuple(one < other for one, other in zip(winner, loser, strict=True)) == worse:
            return _picture(first, rng), _picture(second, rng), label


def _draw_uid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Encode a picture ``(H, W, 3)``, uint8, as JPEG without chroma subsampling, which would blur such small shapes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def generate_pairs(number: int, seed: int, num_inference_steps: int = 20, prompts_per_round: int = 32) -> list[Pair]:
    """Make pairs of pictures that the tiny pipelines sample for held-out captions, labelled by the judge.

    For each caption, each pipeline samples two pictures, with guidance scales 1.5 and 3. Because the shipped pipelines
    rarely make mistakes, half of the pictures with guidance 1.5 are sampled for a caption with one attribute changed.
    All two pictures of a caption whose utilities differ by more than :data:`GENERATED_GAP` make a pair; which picture
    comes first is random. A caption gives about four pairs; ``prompts_per_round`` captions are sampled together.
    """
    pipelines = {name: load_pipeline(folder) for name, folder in PIPELINE_FOLDERS.items()}
    rng = np.random.default_rng([seed, 7])
    pairs: list[Pair] = []
    while len(pairs) < number:
        captions = list({draw_caption(rng, "test").text: None for _ in range(prompts_per_round)})
        made = []
        for name, pipeline in pipelines.items():
            slips = [_near_miss(caption, rng) if rng.random() < 0.5 else caption for caption in captions]
            for asked, scale in ((slips, 1.5), (captions, 3.0)):
                noise, steps = int(rng.integers(2**31)), num_inference_steps
                pixels = sample_pictures(pipeline, asked, noise, num_inference_steps=steps, guidance_scale=scale)
                verdicts = [judge(picture, caption) for picture, caption in zip(pixels, captions, strict=True)]
                made.append(
                    [
                        Picture(_draw_uid(rng), encode_jpeg(picture), name, verdict.alignment, verdict.quality)
                        for picture, verdict in zip(pixels, verdicts, strict=True)
                    ]
                )
        for caption, *pictures in zip(captions, *made, strict=True):
            for one, other in combinations(pictures, 2):
                if abs(one.utility - other.utility) > GENERATED_GAP:
                    first, second = (one, other) if rng.random() < 0.5 else (other, one)
                    pairs.append(Pair(caption, first, second, float(first.utility > second.utility)))
    return pairs[:number]


def _near_miss(text: str, rng: np.random.Generator) -> str:
    """Draw a caption that differs from ``text`` in one attribute."""
    parts = vars(parse_caption(text)).values()
    others = [c for c in all_captions().values() if sum(map(ne, parts, vars(c).values())) == 1]
    return others[int(rng.integers(len(others)))].text
