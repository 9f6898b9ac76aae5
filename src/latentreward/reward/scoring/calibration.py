"""Calibration of raw scores: z-score and quantile relative to the scores of a reference set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from latentreward.core.errors import InputError
from latentreward.reward.scoring.scoring_noise import ScoringNoise

GRID = 1001  # number of quantiles that a calibration stores
FEWEST = 20  # smallest number of reference scores for a calibration


@dataclass(frozen=True)
class Calibration:
    """Mean, standard deviation and quantiles of a model's raw scores on a reference set, at one noise setting.

    Raw scores have no unit, and the scales of two models differ. A z-score or quantile compares an image with the
    images of the reference set.

    Attributes:
        mean: Mean of the raw scores.
        std: Standard deviation of the raw scores, with divisor ``number - 1``.
        quantiles: Raw scores at evenly spaced quantiles from 0 to 1, ascending.
        reference: Name of the reference set.
        number: Number of scores in the reference set.
        noise: Noise levels and seeds at which the reference set was scored.
        seed: Seed with which the reference set was sampled from a larger data set.
        axes: Weights of the two axes of the scores; None for a model with one score.

    Raises:
        InputError: If ``std`` is not positive, or there are fewer than two quantiles, or quantiles are not finite or do
            not ascend.
    """

    mean: float
    std: float
    quantiles: tuple[float, ...]
    reference: str
    number: int
    noise: ScoringNoise
    seed: int = 0
    axes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        grid = torch.tensor(self.quantiles, dtype=torch.float64, device="cpu")
        ascends = len(grid) >= 2 and bool(grid.isfinite().all()) and bool((grid.diff() >= 0).all())
        if not (ascends and self.std > 0 and torch.tensor([self.mean, self.std], device="cpu").isfinite().all()):
            raise InputError(
                f"calibration on {self.reference!r}: mean {self.mean}, std {self.std} and {len(grid)} quantiles are no "
                "calibration; the spread must be positive and the quantiles ascend"
            )

    @classmethod
    def fit(
        cls, scores: Tensor, reference: str, noise: ScoringNoise, seed: int = 0, axes: tuple[float, ...] | None = None
    ) -> Self:
        """Compute a calibration from the raw scores of a reference set.

        Args:
            scores: ``(N,)`` raw scores of the reference set.
            reference: Name of the reference set.
            noise: Noise levels and seeds at which the reference set was scored.
            seed: See :class:`Calibration`.
            axes: See :class:`Calibration`.

        Raises:
            InputError: If there are fewer than :data:`FEWEST` scores, one is not finite, or all are equal.
        """
        scores, place = scores.detach().to("cpu", torch.float64).flatten(), f"calibration on {reference!r}"
        if len(scores) < FEWEST:
            raise InputError(f"{place}: {len(scores)} scores are too few; give at least {FEWEST} images")
        if bad := int((~scores.isfinite()).sum()):
            raise InputError(f"{place}: {bad} of {len(scores)} scores are NaN or infinite")
        if scores.min() == scores.max():
            raise InputError(f"{place}: all {len(scores)} scores are {scores[0]:g}; give images that it tells apart")
        ordered, positions = scores.sort().values, torch.linspace(0, len(scores) - 1, GRID, dtype=torch.float64)
        below, rest = positions.floor().long(), positions.frac()
        grid = ordered[below] + rest * (ordered[positions.ceil().long()] - ordered[below])
        # Rounding in the interpolation can make a quantile smaller than the one before.
        grid = grid.cummax(dim=0).values
        moments, quantiles = (float(scores.mean()), float(scores.std())), tuple(grid.tolist())
        return cls(*moments, quantiles, reference, len(scores), noise, seed, axes)

    def z_score(self, scores: Tensor, noise: ScoringNoise | None = None) -> Tensor:
        """Return ``(score − mean) / std`` of each score, float32, in the shape of ``scores``.

        Args:
            scores: Raw scores.
            noise: Noise setting of ``scores``, to check that the calibration applies; None skips the check.

        Raises:
            InputError: If the levels of ``noise`` differ from those of the calibration.
        """
        self.check(noise)
        return ((scores.double() - self.mean) / self.std).float()

    def quantile(self, scores: Tensor, noise: ScoringNoise | None = None) -> Tensor:
        """Return the share of the reference set with a lower score, in [0, 1], float32, in the shape of ``scores``.

        The share is interpolated linearly between the stored quantiles. It is 0 up to the smallest and 1 from the
        largest reference score. A score that equals several stored quantiles gets the middle of their range. NaN stays
        NaN.

        Args:
            scores: Raw scores.
            noise: See :meth:`z_score`.

        Raises:
            InputError: As in :meth:`z_score`.
        """
        self.check(noise)
        raw = scores.detach().double()
        grid = torch.tensor(self.quantiles, dtype=torch.float64, device=raw.device)
        left = torch.searchsorted(grid, raw.contiguous(), side="left")
        right = torch.searchsorted(grid, raw.contiguous(), side="right")
        last = len(grid) - 1
        low, high = (left - 1).clamp(0, last), left.clamp(0, last)
        gap = grid[high] - grid[low]
        between = low + torch.where(gap > 0, (raw - grid[low]) / gap.clamp_min(torch.finfo(raw.dtype).tiny), 0)
        index = torch.where(right > left, (left + right - 1) / 2, between)
        index = torch.where(raw <= grid[0], 0, torch.where(raw >= grid[-1], last, index))
        return torch.where(raw.isnan(), raw, index / last).float()

    def fits(self, noise: ScoringNoise) -> bool:
        """Tell whether the calibration applies to scores at ``noise``: the levels must be equal, seeds may differ."""
        return (self.noise.sigmas, self.noise.timesteps) == (noise.sigmas, noise.timesteps)

    def check(self, noise: ScoringNoise | None) -> None:
        """Raise InputError if the calibration does not apply to scores at ``noise``; None passes."""
        if noise is not None and not self.fits(noise):
            levels = f"calibrated at {self.noise}, but scored at {noise}"
            raise InputError(f"the model was {levels}; score at that level, or use raw scores")
