"""Scorers whose numbers can be worked out from pixels, and broken ones."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentreward.reward import ImageScorer

CALLS: list[int] = []
"""Pictures of each call of :func:`redness`."""


def redness(prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
    """Mean of the red channel."""
    CALLS.append(len(images))
    return torch.tensor([float(np.asarray(image)[..., 0].mean()) for image in images])


def not_a_number(prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
    """NaN for prompts with a cross."""
    return torch.tensor([float("nan") if "cross" in prompt else 1.0 for prompt in prompts])


class Channels(ImageScorer):
    """Means of two channels, a column each."""

    columns = ("red", "green")

    def identity(self) -> str:
        return "channels"

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        return torch.tensor(np.stack([np.asarray(image).mean(axis=(0, 1))[:2] for image in images]))
