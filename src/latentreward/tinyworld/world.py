"""What pairs are drawn from: captions, pictures for them, and what these are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentreward.tinyworld.captions import draw_caption
from latentreward.tinyworld.drawing import draw_scene
from latentreward.tinyworld.rendering import render
from latentreward.tinyworld.scenes import scene_alignment


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
