"""Data module of the tiny world's captions as prompts for alignment."""

from typing import Any

import numpy as np

from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.errors import InputError
from latentreward.tinyworld.captions import caption_splits, draw_caption


class TinyWorldPromptDataModule(PromptLoaders):
    """Data module of distinct captions of the tiny world's training split, drawn at random, as prompts.

    Args:
        captions: Number of captions.
        data_seed: Seed of the choice of captions.
        options: See :class:`~latentreward.data.alignment.prompts.PromptLoaders`.

    Raises:
        InputError: If ``captions`` is below 1 or above the number of captions in the training split.
    """

    def __init__(self, captions: int = 1024, data_seed: int = 0, **options: Any) -> None:
        there_are = sum(map(len, caption_splits()["train"].values()))
        if not 1 <= captions <= there_are:
            raise InputError(f"data.captions={captions}: the training split has {there_are}, so use 1 to {there_are}")
        rng, drawn = np.random.default_rng([data_seed, 5]), dict[str, None]()
        while len(drawn) < captions:
            drawn.setdefault(draw_caption(rng, "train").text)
        super().__init__(tuple(drawn), **options)
