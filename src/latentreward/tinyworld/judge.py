"""The tiny world's judge as a scorer of pictures, for evaluation."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from latentreward.scorers.base import ImageScorer
from latentreward.tinyworld.oracle import judge

COLUMNS = ("utility", "alignment", "all_right", "quality")


class TinyWorldJudge(ImageScorer):
    """A scorer of pictures by the judge of the tiny world: utility, alignment, all_right and quality.

    The judge is for evaluation: a policy aligned to it could not be judged by it.
    """

    def __init__(self) -> None:
        super().__init__("judge")

    @property
    def columns(self) -> tuple[str, ...]:
        """See :attr:`Scorer.columns`."""
        return COLUMNS

    def identity(self) -> str:
        """See :meth:`Scorer.identity`."""
        return type(self).__name__

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`; scores ``(B, 4)``."""
        verdicts = [judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor([[float(getattr(verdict, name)) for name in COLUMNS] for verdict in verdicts])
