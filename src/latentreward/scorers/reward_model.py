"""A latent reward model as a scorer of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from torch import Tensor

from latentreward.devices import find_device
from latentreward.scorers.base import ImageScorer

if TYPE_CHECKING:
    from latentreward.scoring import PublishedSettings, RewardModel, ScoringNoise

PLAIN_CHECKPOINTS = ("reward", "last", "best", "model")
"""Names of checkpoints that tell nothing beside the name of their run."""
INNER_FOLDER = re.compile(r"checkpoints?|lightning_logs|version_\d+")
"""Folders in a run whose names tell nothing of it."""
LONGEST_NAME = 80


def reward_name(path: str, folders: int = 1) -> str:
    """Name of a reward model for its columns: of its run or folder, of a hub id the last part.

    A checkpoint that is not one of ``PLAIN_CHECKPOINTS`` adds its own: ``runs/first/checkpoints/step=200.ckpt`` is
    ``first_step_200``.

    Args:
        path: What ``RewardModel.from_pretrained`` takes.
        folders: How many folders tell it from others.
    """
    place = Path(path).resolve() if Path(path).exists() else Path(path)
    stem = [place.stem] if place.suffix == ".ckpt" and place.stem not in PLAIN_CHECKPOINTS else []
    place = place.parent if place.suffix == ".ckpt" else place
    parts = [part for part in place.parts if not INNER_FOLDER.fullmatch(part) and part != place.anchor]
    words = re.sub(r"\W+", "_", "_".join([*parts[-folders:], *stem]), flags=re.ASCII).strip("_")[-LONGEST_NAME:]
    return words if re.match("[A-Za-z]", words) and words not in ("image", "label", "problem") else f"reward_{words}"


def reward_names(paths: Sequence[str]) -> list[str]:
    """:func:`reward_name` of each, with as many folders as it takes to tell them apart."""
    folders = [1] * len(paths)
    deepest = max((len(Path(path).absolute().parts) for path in paths), default=0)
    for depth in range(2, deepest + 1):
        names = [reward_name(path, number) for path, number in zip(paths, folders, strict=True)]
        folders = [depth if names.count(name) > 1 else number for name, number in zip(names, folders, strict=True)]
    return [reward_name(path, number) for path, number in zip(paths, folders, strict=True)]


class RewardModelScorer(ImageScorer):
    """An LRM, DiNa-LRM or any other reward model of this program, on images.

    Args:
        path: What ``RewardModel.from_pretrained`` takes: a folder or hub id of a published model, a checkpoint, or the
            folder of a run.
        name: Name of its columns; :func:`reward_name` of its path by default.
        noise: Levels and draws; the model's own by default.
        base: Base pipeline, if not the one that the model names.
        config: Settings of the run, if not beside its checkpoint.
        device: E.g. ``cuda:1``; ``auto`` takes the accelerator if there is one.
        dtype: Precision of the backbone; VAE, head and score are float32.
        batch_size: Images per pass.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether the model's settings may name classes that are not registered, which are imported.
        published: Settings that the files of a published layout do not hold, such as ``guidance: 1``.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        *,
        noise: ScoringNoise | None = None,
        base: str | None = None,
        config: str | None = None,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 8,
        revision: str | None = None,
        trust_remote_code: bool = False,
        published: PublishedSettings | None = None,
    ) -> None:
        super().__init__(reward_name(path) if name is None else name, batch_size)
        self.path, self.noise, self.base, self.config = path, noise, base, config
        self.revision, self.trust_remote_code, self.published = revision, trust_remote_code, published
        self.device, self.dtype = find_device(device), dtype

    def identity(self) -> str:
        """Class, path, base, published settings if they are set, noise and precision."""
        base = "" if self.base is None else f" base {self.base}"
        revision = "" if self.revision is None else f"@{self.revision}"
        own = "" if self.published is None else f" {self.published}"
        noise = self.noise or "of the model"
        return f"{type(self).__name__} {self.path}{revision}{base}{own} noise {noise} {self.dtype}"

    def prepare(self) -> None:
        """Load the model."""
        self.model  # noqa: B018

    @cached_property
    def model(self) -> RewardModel:
        """The model, loaded at the first use.

        Raises:
            InputError: If a file is missing or damaged, or does not fit.
        """
        from latentreward.scoring import RewardModel

        return RewardModel.from_pretrained(
            self.path,
            revision=self.revision,
            base=self.base,
            config=self.config,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            trust_remote_code=self.trust_remote_code,
            published=self.published,
        )

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`."""
        return self.model.score(prompts, images, noise=self.noise, batch_size=self.batch_size)

    def score_levels(
        self, prompts: Sequence[str], images: Sequence[Image.Image], levels: Sequence[ScoringNoise]
    ) -> Tensor:
        """Scores ``(B, K)`` under each of K settings of noise; images are encoded once."""
        return self.model.score_levels(prompts, images, levels, batch_size=self.batch_size)
