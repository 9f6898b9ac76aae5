"""Noise at which a reward model scores: levels, calibration of their scores, and seeded noise for the latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from latentreward.core.errors import InputError, check_once
from latentreward.core.running import scoring_generator
from latentreward.diffusion import NoiseProcess

MOST_DRAWS = 1000
"""Largest number of noisy latents of an image: a model's file could keep a machine busy without end."""


@dataclass(frozen=True)
class ScoringNoise:
    """Noise levels and seeds at which a score is computed.

    Levels are given as ``sigmas`` or as ``timesteps``. Several levels make an ensemble: the head computes one score
    from all of them (``score_ensemble``). With several seeds, the scores of the seeds are averaged. The noise is seeded
    with a hash of prompt, seed, noise level and shape of the latents. A score therefore does not depend on batch or
    order, and all images of a prompt get the same noise, as in DiNa-LRM (arXiv:2602.11146).

    Attributes:
        sigmas: Noise levels in [0, 1]; each is replaced by the nearest level of the model's noise process.
        timesteps: Timesteps of the model's noise process.
        seeds: Seeds; each gives one noise sample per level.
    """

    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in ("sigmas", "timesteps", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if bool(self.sigmas) == bool(self.timesteps):
            given = f"noise.sigmas={list(self.sigmas)} and noise.timesteps={list(self.timesteps)}"
            raise InputError(f"{given}: give levels as one of the two, e.g. sigmas: [0.4], or timesteps: [1]")
        if outside := [sigma for sigma in self.sigmas if not 0 <= sigma <= 1]:
            raise InputError(f"noise.sigmas holds {outside[0]}; noise levels lie in [0, 1]")
        whole = all(type(seed) is int for seed in self.seeds)
        if not self.seeds or not whole or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"noise.seeds={list(self.seeds)}; give at least one whole number, each once")
        if (draws := len(self.sigmas or self.timesteps) * len(self.seeds)) > MOST_DRAWS:
            raise InputError(f"noise: levels times seeds are {draws}; give at most {MOST_DRAWS} together")

    def __str__(self) -> str:
        """Return a short name for tables, e.g. ``sigma 0.4`` or ``t 1, 3 seeds``."""
        levels = self.sigmas or self.timesteps
        text = f"{'sigma' if self.sigmas else 't'} {'+'.join(f'{level:g}' for level in levels)}"
        if self.seeds != (0,):
            text += f", seed {self.seeds[0]}" if len(self.seeds) == 1 else f", {len(self.seeds)} seeds"
        return text


@dataclass(frozen=True)
class NoiseSettings:
    """Noise that is added to images before scoring; a setting that is left out keeps the model's value.

    Attributes:
        sigmas: Noise levels in [0, 1]; several levels make one ensemble score.
        timesteps: Timesteps of the model's noise process, instead of noise levels.
        seeds: Seeds of the noise; the scores of all seeds are averaged.
    """

    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.over(ScoringNoise(timesteps=(1.0,)))

    def over(self, own: ScoringNoise) -> ScoringNoise:
        """Override the given settings in ``own``, the model's noise."""
        check_once(**{"noise.sigmas": self.sigmas, "noise.timesteps": self.timesteps})
        given = {name: value for name, value in vars(self).items() if value}
        if self.sigmas or self.timesteps:
            given = {"sigmas": (), "timesteps": (), **given}
        return replace(own, **given)


def timesteps_of(noise: ScoringNoise, process: NoiseProcess) -> Tensor:
    """Return the timesteps ``(K,)``, float32, of ``process`` that are nearest to the K levels of ``noise``."""
    if noise.sigmas:
        return process.timesteps_at(torch.tensor(noise.sigmas, dtype=torch.float32))
    return process.snap(torch.tensor(noise.timesteps, dtype=torch.float32))


def draw_noise(prompts: Sequence[str], seed: int, sigma: float, shape: Sequence[int]) -> Tensor:
    """Return standard normal noise ``(B, *shape)``, float32 on the CPU; rows with equal prompts get equal noise."""
    drawn = {}
    for prompt in dict.fromkeys(prompts):
        generator = scoring_generator(prompt, seed, sigma, shape)
        drawn[prompt] = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
    return torch.stack([drawn[prompt] for prompt in prompts])


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
            found = f"mean {self.mean}, std {self.std} and {len(grid)} quantiles are no calibration"
            remedy = "the spread must be positive and the quantiles ascend"
            raise InputError(f"calibration on {self.reference!r}: {found}; {remedy}")

    @classmethod
    def fit(
        cls, scores: Tensor, reference: str, noise: ScoringNoise, seed: int = 0, axes: tuple[float, ...] | None = None
    ) -> Self:
        """Compute a calibration from the raw scores ``(N,)`` of a reference set; see the attributes for the rest.

        There must be at least :data:`FEWEST` scores, all finite, and not all equal.
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

    def z_score(self, scores: Tensor) -> Tensor:
        """Return ``(score − mean) / std`` of each score, float32, in the shape of ``scores``."""
        return ((scores.double() - self.mean) / self.std).float()

    def quantile(self, scores: Tensor) -> Tensor:
        """Return the share of the reference set with a lower score, in [0, 1], float32, in the shape of ``scores``.

        The share is interpolated linearly between the stored quantiles. It is 0 up to the smallest and 1 from the
        largest reference score. A score that equals several stored quantiles gets the middle of their range. NaN stays
        NaN.
        """
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
