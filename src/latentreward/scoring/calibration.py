"""Where a raw score stands among the scores of a stored reference set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.scoring.scoring_noise import ScoringNoise

GRID = 1001
"""Quantiles that are kept."""
FEWEST = 20
"""Scores below which mean and quantiles say too little."""


@dataclass(frozen=True)
class Calibration:
    """Mean, spread and quantiles of a model's raw scores on a reference set, under one setting of noise.

    A raw score has no unit, and another model's has another; a z-score or a quantile says how an image compares with
    the reference set's.

    Attributes:
        mean: Of the raw scores.
        std: Of the raw scores, with the number − 1 as divisor.
        quantiles: Raw scores at evenly spaced quantiles from 0 to 1, ascending.
        reference: Name of the reference set.
        number: Scores in it.
        noise: Noise levels and draws under which they were made.
        seed: Seed by which the reference set was drawn from a larger one.

    Raises:
        InputError: If the spread is not positive, or the quantiles are too few, not finite or do not ascend.
    """

    mean: float
    std: float
    quantiles: tuple[float, ...]
    reference: str
    number: int
    noise: ScoringNoise
    seed: int = 0

    def __post_init__(self) -> None:
        grid = torch.tensor(self.quantiles, dtype=torch.float64)
        ascends = len(grid) >= 2 and bool(grid.isfinite().all()) and bool((grid.diff() >= 0).all())
        if not (ascends and self.std > 0 and torch.tensor([self.mean, self.std]).isfinite().all()):
            raise InputError(
                f"calibration on {self.reference!r}: mean {self.mean}, std {self.std} and {len(grid)} quantiles are no "
                "calibration; the spread must be positive and the quantiles ascend"
            )

    @classmethod
    def fit(cls, scores: Tensor, reference: str, noise: ScoringNoise, seed: int = 0) -> Self:
        """Calibrate on raw ``scores`` ``(N,)``.

        Args:
            scores: Of the reference set.
            reference: Its name.
            noise: Noise levels and draws under which they were made.
            seed: See :class:`Calibration`.

        Raises:
            InputError: If there are fewer than :data:`FEWEST` scores, one is not finite, or all are equal.
        """
        scores = scores.detach().to("cpu", torch.float64).flatten()
        if len(scores) < FEWEST:
            raise InputError(
                f"calibration on {reference!r}: {len(scores)} scores are too few; give at least {FEWEST} images"
            )
        bad = int((~scores.isfinite()).sum())
        if bad:
            raise InputError(f"calibration on {reference!r}: {bad} of {len(scores)} scores are NaN or infinite")
        if scores.min() == scores.max():
            raise InputError(
                f"calibration on {reference!r}: all {len(scores)} scores are {scores[0]:g}; give images that the model "
                "tells apart"
            )
        ordered, places = scores.sort().values, torch.linspace(0, len(scores) - 1, GRID, dtype=torch.float64)
        below, rest = places.floor().long(), places.frac()
        grid = ordered[below] + rest * (ordered[places.ceil().long()] - ordered[below])
        # rounding of the interpolation must not break the order
        grid = grid.cummax(dim=0).values
        return cls(float(scores.mean()), float(scores.std()), tuple(grid.tolist()), reference, len(scores), noise, seed)

    def z_score(self, scores: Tensor, noise: ScoringNoise | None = None) -> Tensor:
        """``(score − mean) / std``, the shape of ``scores``, float32.

        Args:
            scores: Raw scores.
            noise: What they were made under, which is then compared.

        Raises:
            InputError: If ``noise`` has other levels than the calibration.
        """
        self.check(noise)
        return ((scores.double() - self.mean) / self.std).float()

    def quantile(self, scores: Tensor, noise: ScoringNoise | None = None) -> Tensor:
        """Share of the reference set that scores lower: in [0, 1], the shape of ``scores``, float32.

        Linear between the stored quantiles, 0 below the smallest and 1 above the largest; a value that many reference
        scores share gets the middle of the range of quantiles that it spans. NaN stays NaN.

        Args:
            scores: Raw scores.
            noise: See :meth:`z_score`.

        Raises:
            InputError: As :meth:`z_score`.
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
        place = torch.where(right > left, (left + right - 1) / 2, between)
        place = torch.where(raw <= grid[0], 0, torch.where(raw >= grid[-1], last, place))
        return torch.where(raw.isnan(), raw, place / last).float()

    def fits(self, noise: ScoringNoise) -> bool:
        """Whether scores under ``noise`` may be calibrated: the levels must agree, the draws need not."""
        return (self.noise.sigmas, self.noise.timesteps) == (noise.sigmas, noise.timesteps)

    def check(self, noise: ScoringNoise | None) -> None:
        """Raise InputError if scores under ``noise`` may not be calibrated; None is not compared."""
        if noise is not None and not self.fits(noise):
            raise InputError(
                f"the model was calibrated at {self.noise}, but scored at {noise}; score at that level, or use raw "
                "scores"
            )

    def record(self) -> dict[str, Any]:
        """Plain values for JSON, from which :meth:`of_record` makes an equal calibration."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """The calibration behind a :meth:`record`.

        Raises:
            InputError: If an entry is missing, unknown or of another kind.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(record, Mapping) or set(record) != names:
            raise InputError(f"calibration: expected the entries {', '.join(sorted(names))}")
        try:
            noise = ScoringNoise(**record["noise"])
            quantiles = tuple(float(value) for value in record["quantiles"])
            numbers = {"mean": float(record["mean"]), "std": float(record["std"])}
            counts = {"number": int(record["number"]), "seed": int(record["seed"])}
        except (TypeError, ValueError) as error:
            raise InputError(f"calibration: {error}") from error
        return cls(**numbers, **counts, quantiles=quantiles, reference=str(record["reference"]), noise=noise)
