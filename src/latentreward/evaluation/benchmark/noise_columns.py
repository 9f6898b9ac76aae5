"""A latent reward as several scores of an image: under further draws of its noise, and at single noise levels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from latentreward.errors import InputError, check_at_least_one
from latentreward.scorers import ImageScorer, RewardModelScorer
from latentreward.scoring import ScoringNoise


class NoiseColumns(ImageScorer):
    """Its own score, the same with other draws, and the score at each level with its seeds; images are encoded once.

    Args:
        scorer: The latent reward.
        levels: Noise levels in [0, 1].
        draws: How many draws of the scorer's own noise; the first is its score.

    Raises:
        InputError: If a level is out of range or there is no draw.
    """

    def __init__(self, scorer: RewardModelScorer, levels: Sequence[float], draws: int) -> None:
        super().__init__(scorer.name, scorer.batch_size)
        check_at_least_one(draws=draws)
        if len(set(levels)) < len(levels):
            raise InputError(f"levels={list(levels)} holds a level twice; leave one")
        self.scorer, self.levels, self.draws = scorer, tuple(levels), draws
        for level in levels:
            ScoringNoise(sigmas=(level,))

    @property
    def draw_columns(self) -> tuple[str, ...]:
        """Names of the scores with further draws."""
        return tuple(f"{self.name} draw {draw}" for draw in range(1, self.draws))

    @property
    def level_columns(self) -> tuple[str, ...]:
        """Names of the scores at the levels."""
        return tuple(f"{self.name} sigma {level:g}" for level in self.levels)

    @property
    def columns(self) -> tuple[str, ...]:
        """Its own name, then further draws, then levels."""
        return self.name, *self.draw_columns, *self.level_columns

    def identity(self) -> str:
        """That of the scorer, levels and draws."""
        return f"{self.scorer.identity()}, {self.draws} draws, levels {list(self.levels)}"

    def prepare(self) -> None:
        """See :meth:`ImageScorer.prepare`."""
        self.scorer.prepare()

    def timesteps(self) -> list[float]:
        """What the levels are to the model's network."""
        process = self.scorer.model.backbone.noise_process
        return process.timesteps_at(torch.tensor(self.levels)).tolist()

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`: ``(B, K)``, or ``(B,)`` if there is but one column."""
        scores = self.scorer.score_levels(prompts, images, self._settings())
        return scores if len(self.columns) > 1 else scores[:, 0]

    def _settings(self) -> list[ScoringNoise]:
        own = self.scorer.noise or self.scorer.model.noise
        step = max(own.seeds) - min(own.seeds) + 1
        seeds = [tuple(seed + draw * step for seed in own.seeds) for draw in range(self.draws)]
        at_levels = (replace(own, sigmas=(level,), timesteps=()) for level in self.levels)
        return [*(replace(own, seeds=draw) for draw in seeds), *at_levels]
