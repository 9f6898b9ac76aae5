"""Several scores of an image by one latent reward: with different noise, at single noise levels, and of two axes."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.errors import InputError
from latentreward.reward import ImageScorer, RewardModelScorer, ScoringNoise


class NoiseColumns(ImageScorer):
    """Scorer with several columns: the latent reward's own score, that score with other noise, and one per noise level.

    A model with two axes has a column for each of them too, with the noise of its own score. Images are encoded once
    for all columns.

    Args:
        scorer: The latent reward.
        levels: Noise levels in [0, 1]; each is scored with the seeds of the reward's own noise.
        draws: Number of noise draws at the reward's own noise levels, at least 1; the first one gives its own score.
    """

    def __init__(self, scorer: RewardModelScorer, levels: Sequence[float], draws: int) -> None:
        super().__init__(scorer.name, scorer.batch_size)
        if len(set(levels)) < len(levels):
            raise InputError(f"levels={list(levels)} holds a level twice; leave one")
        self.scorer, self.levels, self.draws = scorer, tuple(levels), draws
        for level in levels:
            ScoringNoise(sigmas=(level,))
        # Names of the scores with the second and further noise draws, and of those at the single noise levels.
        self.draw_columns = tuple(f"{self.name} draw {draw}" for draw in range(1, draws))
        self.level_columns = tuple(f"{self.name} sigma {level:g}" for level in levels)

    @property
    def axis_columns(self) -> dict[str, str]:
        """Axis of the model → name of its scores; empty for a model with one score."""
        return {axis: f"{self.name} {axis}" for axis in self.scorer.axes}

    @property
    def columns(self) -> tuple[str, ...]:
        """Name of the reward's own score, then :attr:`draw_columns`, :attr:`level_columns`, :attr:`axis_columns`."""
        return self.name, *self.draw_columns, *self.level_columns, *self.axis_columns.values()

    def identity(self) -> str:
        """Return the reward's identity with the number of draws and the noise levels."""
        return f"{self.scorer.identity()}, {self.draws} draws, levels {list(self.levels)}"

    def prepare(self) -> None:
        self.scorer.prepare()

    def timesteps(self) -> list[float]:
        """Return the timestep of the model's noise process for each noise level."""
        process = self.scorer.model.backbone.noise_process
        return process.timesteps_at(torch.tensor(self.levels)).tolist()

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """Score B images: ``(B, K)`` for K columns, or ``(B,)`` for one; see :meth:`ImageScorer.score`."""
        own = self.scorer.noise or self.scorer.model.noise
        step = max(own.seeds) - min(own.seeds) + 1  # so that no two draws share a seed
        noises = [replace(own, seeds=tuple(seed + draw * step for seed in own.seeds)) for draw in range(self.draws)]
        noises += [replace(own, sigmas=(level,), timesteps=()) for level in self.levels]
        if self.axis_columns:
            outputs = self.scorer.score_levels(prompts, images, noises, axes=True)
            return torch.cat([self.scorer.model.head.total(outputs), outputs[:, 0]], dim=1)
        scores = self.scorer.score_levels(prompts, images, noises)
        return scores if len(self.columns) > 1 else scores[:, 0]
