"""Base classes of scorers: those that score pixels, and those that look up known scores."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import PreferencePair
from latentreward.core.errors import InputError, check_at_least_one, printable
from latentreward.core.promises import Part, of_class, returns, shown


class Scorer(Part):
    """Base class of all scorers.

    Args:
        name: Name of the scores in tables, with columns ``NAME_a``, ``NAME_b`` and ``NAME_gap``: ASCII letters, digits
            and underscores, beginning with a letter.
    """

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in ("image", "label", "problem"):
            raise InputError(
                f"name of a scorer is {name!r}; use a to z, A to Z, digits and _, not image, label or problem"
            )
        self.name = name

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the scorer's K scores per image; one by default. With K > 1 an image scorer returns ``(B, K)``."""
        return (self.name,)

    @abstractmethod
    @returns(of_class(str))
    def identity(self) -> str:
        """Return one line that names everything the scores depend on; a run can be resumed only with the same line."""


class ImageScorer(Scorer):
    """Base class of scorers that score the pixels of images, each for its prompt.

    Derive a class from this one, or wrap a function in :class:`~latentreward.reward.CallableScorer`.

    Args:
        name: See :class:`Scorer`.
        batch_size: Greatest number of images per call of :meth:`score`.

    Attributes:
        uses_prompt: Whether the score depends on the prompt. If False, an image is scored once, also if it occurs with
            several prompts.
    """

    uses_prompt: bool = True

    def __init__(self, name: str, batch_size: int = 32) -> None:
        super().__init__(name)
        check_at_least_one(f"{name}.", batch_size=batch_size)
        self.batch_size = batch_size

    @property
    def served_model(self) -> str | None:
        """Model that a server has named with its scores; None for a scorer in this process, or before the first score.

        Scores that are kept are told apart by it too, since :meth:`identity` cannot know it.
        """
        return None

    def prepare(self) -> None:
        """Load models; called once, after all settings have been checked and before the first image is scored."""

    @abstractmethod
    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """Score B RGB images of any sizes, each for its prompt.

        Args:
            prompts: B prompts, with B at most ``batch_size``.
            images: B images.

        Returns:
            Scores ``(B,)``, or ``(B, K)`` for K :attr:`columns`.
        """

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """Score N images in batches: ``(N,)``, or ``(N, K)`` for K :attr:`columns`, float32 on the CPU."""
        if len(prompts) != len(images):
            given = f"{len(prompts)} prompts for {len(images)} images"
            raise InputError(f"scorer {self.name!r} got {given}; give one for each")
        batches = [slice(start, start + self.batch_size) for start in range(0, len(images), self.batch_size)]
        scores = [self._checked(prompts[batch], images[batch]) for batch in batches]
        return torch.cat(scores or [torch.zeros(0) if len(self.columns) == 1 else torch.zeros(0, len(self.columns))])

    def _checked(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        # Copies, since others score the images too, and methods of Pillow such as thumbnail change them.
        scores = self.score(prompts, [image.copy() for image in images])
        shape = (len(images),) if len(self.columns) == 1 else (len(images), len(self.columns))
        if not isinstance(scores, Tensor) or scores.shape != shape:
            found = f"{shown(scores)} for {len(images)} images"
            raise InputError(f"scorer {self.name!r} returned {found}; it must be a tensor {shape}")
        scores = scores.detach().float().cpu()
        if not scores.isfinite().all():
            first, *column = (~scores.isfinite()).nonzero()[0].tolist()
            value = scores[first, *column].item()
            raise InputError(
                f"scorer {self.name!r} returned {value} for the prompt {prompts[first][:60]!r} and an "
                f"image of {images[first].width}×{images[first].height}; try dtype float32, or look at its weights"
            )
        return scores


def _wrong_table(found: np.ndarray, scorer: "TableScorer", pairs: Sequence[PreferencePair]) -> str | None:
    if isinstance(found, np.ndarray) and found.shape == (len(pairs), 2) and found.dtype == np.float64:
        return None
    got = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else shown(found)
    return f"{got}; it must be a float64 array ({len(pairs)}, 2)"


class TableScorer(Scorer):
    """Base class of scorers that look up scores computed elsewhere."""

    @abstractmethod
    @returns(_wrong_table, each=True)
    def lookup(self, pairs: Sequence[PreferencePair]) -> np.ndarray:
        """Look up the scores of N pairs: ``(N, 2)`` float64 for images a and b, NaN where there is no score."""


def one_model(scorer: str, kept: str | None, now: str | None, remedy: str) -> str | None:
    """Return the model that a server named with kept and new scores, or None; raise InputError if they differ."""
    if None not in (kept, now) and kept != now:
        raise InputError(
            f"scorer {scorer!r}: its server now names the model {printable(str(now))!r}, but scores are kept of the "
            f"model {printable(str(kept))!r}; {remedy}"
        )
    return kept or now


def code_of(called: Any) -> Any:
    """Return the function, method or class whose code runs when a function, partial function or object is called."""
    called = called.func if isinstance(called, partial) else called
    return called if hasattr(called, "__qualname__") else type(called)
