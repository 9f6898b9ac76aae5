"""What the pretraining of generators asks of a world beyond what pairs ask."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL

from latentreward.tinyworld.captions import held_out_captions
from latentreward.tinyworld.oracle import mean_verdict
from latentreward.tinyworld.pairs import World

CLEAR_GAP = 0.3
"""Utility gap above which pairs count in the agreement with the oracle."""


class TrainingWorld(World):
    """The drawn shapes; a subclass has other pictures.

    Attributes:
        pretraining: Split that generators learn.
        words: Words of the tokenizer; those of the shapes if None.
        readme: Name of the text in ``readmes.yaml``; that of the pipeline if empty.
    """

    pretraining: str = "train"
    words: tuple[str, ...] | None = None
    readme: str = ""

    def held_out_captions(self, number: int, seed: int) -> list[str]:
        """Draw texts of captions, possibly with repeats, on which generators are evaluated."""
        return held_out_captions(number, seed)

    def prepare(self, made: Path, vae: AutoencoderKL, seed: int, pictures: int, steps: int) -> None:
        """Make what else the world needs, with a number of pictures and of updates, in the folder of the pipelines."""

    def mean_verdict(self, captions: Sequence[str], pictures: np.ndarray, made: Path) -> dict[str, float]:
        """Judge pictures ``(N, 32, 32, 3)``; return means of ``alignment``, ``all_right``, ``quality``, ``utility``."""
        return mean_verdict(captions, list(pictures))
