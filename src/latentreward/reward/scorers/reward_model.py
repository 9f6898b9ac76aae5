"""A latent reward model as a scorer of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import PathText
from latentreward.core.running import find_device
from latentreward.reward.scorers.base import ImageScorer
from latentreward.reward.scoring.find import ModelSource

if TYPE_CHECKING:
    from latentreward.reward.scoring.reward_model import RewardModel
    from latentreward.reward.scoring.scoring_noise import ScoringNoise

PLAIN_CHECKPOINTS = ("reward", "last", "best", "model")
"""File names of checkpoints, without ending, that are left out of a model's name."""
INNER_FOLDER = re.compile(r"checkpoints?|lightning_logs|version_\d+")
"""Names of folders inside a run that are left out of a model's name."""


def reward_name(path: str) -> str:
    """Derive the name of a reward model's scores in tables from its path.

    The name is that of the run or model folder, or the last part of a hub id. The name of a checkpoint is added unless
    it is one of :data:`PLAIN_CHECKPOINTS`: ``runs/first/checkpoints/step=200.ckpt`` becomes ``first_step_200``. Of a
    long name the last 80 characters are kept.
    """
    place = Path(path).resolve() if Path(path).exists() else Path(path)
    stem = [place.stem] if place.suffix == ".ckpt" and place.stem not in PLAIN_CHECKPOINTS else []
    place = place.parent if place.suffix == ".ckpt" else place
    parts = [part for part in place.parts if not INNER_FOLDER.fullmatch(part) and part != place.anchor]
    words = re.sub(r"\W+", "_", "_".join([*parts[-1:], *stem]), flags=re.ASCII).strip("_")[-80:]
    return words if re.match("[A-Za-z]", words) and words not in ("image", "label", "problem") else f"reward_{words}"


def reward_names(paths: Sequence[str]) -> list[str]:
    """Return :func:`reward_name` of each path, numbered where a name recurs."""
    names = [reward_name(path) for path in paths]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}_{number + 1}" if number else name for name, number in zip(names, earlier, strict=True)]


class RewardModelScorer(ImageScorer):
    """A scorer of images by an LRM, DiNa-LRM or other reward model of latentreward.

    Args:
        path: Path or hub id of the model, see :class:`~latentreward.reward.ModelSource`.
        name: Name of the scores in tables; :func:`reward_name` of ``path`` by default.
        noise: Noise levels and seeds; those of the model by default.
        device: Device such as ``cuda:1``; ``auto`` takes the accelerator if there is one.
        dtype: Dtype of the backbone; VAE, head and score are float32.
        batch_size: Images per forward pass.
        loading: See :class:`~latentreward.reward.ModelSource`.
    """

    def __init__(
        self,
        path: PathText,
        name: str | None = None,
        *,
        noise: ScoringNoise | None = None,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 8,
        **loading: Any,
    ) -> None:
        super().__init__(reward_name(path) if name is None else name, batch_size)
        self.model_source = source = ModelSource(path, **loading)
        # Files whose contents tell whether kept scores are still those of the model.
        self.path, self.base, self.config, self.revision = path, source.base, source.config, source.revision
        self.noise, self.device, self.dtype = noise, find_device(device), dtype

    def identity(self) -> str:
        base = "" if self.base is None else f" base {self.base}"
        own = "" if self.model_source.published is None else f" {self.model_source.published}"
        noise = self.noise or "of the model"
        return f"{type(self).__name__} {self.model_source}{base}{own} noise {noise} {self.dtype}"

    def prepare(self) -> None:
        """Load the model."""
        self.model  # noqa: B018

    @cached_property
    def model(self) -> RewardModel:
        """Reward model, loaded at the first use."""
        from latentreward.reward.scoring.reward_model import RewardModel

        model = RewardModel.from_pretrained(self.model_source, device=self.device, dtype=getattr(torch, self.dtype))
        model.require_images(type(self).__name__)
        return model

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        return self.model.score(prompts, images, noise=self.noise, batch_size=self.batch_size)

    def score_levels(
        self, prompts: Sequence[str], images: Sequence[Image.Image], levels: Sequence[ScoringNoise]
    ) -> Tensor:
        """Score B images under each of K noise settings ``(B, K)``; images are encoded once."""
        return self.model.score_levels(prompts, images, levels, batch_size=self.batch_size)
