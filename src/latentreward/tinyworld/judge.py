"""The tiny world's judges as scorers of pictures, for evaluation."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import decode_image
from latentreward.reward import ImageScorer
from latentreward.tinyworld.edits import judge_edit
from latentreward.tinyworld.oracle import judge

COLUMNS = ("utility", "alignment", "all_right", "quality")
EDIT_COLUMNS = ("utility", "followed", "kept")


class TinyWorldJudge(ImageScorer):
    """A scorer of pictures by the judge of the tiny world: utility, alignment, all_right and quality.

    The judge is for evaluation: a policy aligned to it could not be judged by it.
    """

    def __init__(self) -> None:
        super().__init__("judge")

    @property
    def columns(self) -> tuple[str, ...]:
        return COLUMNS

    def identity(self) -> str:
        return type(self).__name__

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`; scores ``(B, 4)``."""
        verdicts = [judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor([[float(getattr(verdict, name)) for name in COLUMNS] for verdict in verdicts])


class TinyWorldEditJudge(ImageScorer):
    """A scorer of edited pictures by the judge of the tiny world: utility, followed and kept.

    The prompts carry the pictures that were edited. As :class:`TinyWorldJudge`, it is for evaluation.
    """

    def __init__(self) -> None:
        super().__init__("edit_judge")

    @property
    def columns(self) -> tuple[str, ...]:
        return EDIT_COLUMNS

    def identity(self) -> str:
        return type(self).__name__

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`; scores ``(B, 3)``."""
        rows = []
        for prompt, image in zip(prompts, images, strict=True):
            if not sources_of(prompt):
                raise InputError(
                    f"scorer {self.name!r}: the prompt {prompt[:80]!r} has no picture to edit; give source_images"
                )
            verdict = judge_edit(decode_image(sources_of(prompt)[0]), image, prompt)
            rows.append([float(getattr(verdict, name)) for name in EDIT_COLUMNS])
        return torch.tensor(rows)
