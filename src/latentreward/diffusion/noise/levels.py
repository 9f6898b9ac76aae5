"""Samplers of the timestep, and so of the noise level, at which a training pair is compared.

A sampler draws from the pair's own generator alone, so that a pair's timestep does not depend on the rest of the batch.
"""

import math
from abc import abstractmethod

import torch
from torch import Generator, Tensor

from latentreward.core.errors import InputError, check_range
from latentreward.core.promises import Part, returns, tensor, wrong_tensor
from latentreward.diffusion.noise.base import NoiseProcess


class LevelSampler(Part):
    """Sampler of the timestep of one pair, or of one image if the two images of a pair get different timesteps."""

    @abstractmethod
    @returns(
        lambda found, sampler, generator, process: wrong_tensor(found, (1,), high=process.highest, low=0.0),
        each=True,
    )
    def draw(self, generator: Generator, process: NoiseProcess) -> Tensor:
        """Draw one timestep of ``process``, ``(1,)`` float32, with random numbers from ``generator`` alone."""


class TargetSigma(LevelSampler):
    """Base class of samplers that draw a wanted noise level u in [0, 1]; the nearest level of the process is used.

    Note:
        u is a *noise level*, not a fraction of the schedule (released DiNa-LRM code; arXiv:2602.11146).
    """

    @abstractmethod
    @returns(tensor(lambda sampler, uniform, normal: uniform.shape, low=0.0, high=1.0), each=True)
    def transform(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Compute wanted noise levels from random numbers: uniform in [0, 1) and standard normal, of equal shape."""

    def draw(self, generator: Generator, process: NoiseProcess) -> Tensor:
        uniform, normal = torch.rand(1, generator=generator), torch.randn(1, generator=generator)
        return process.timesteps_at(self.transform(uniform, normal))


class UniformSigma(TargetSigma):
    """Sampler of noise levels uniform in [low, high]; DiNa-LRM uses [0, 1].

    Args:
        low: Lowest noise level.
        high: Highest noise level.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        check_range("[0, 1]", high=high)
        check_range(f"[0, {high}]", low=low)
        self.low, self.high = low, high

    def transform(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * uniform


class ConstantSigma(TargetSigma):
    """Sampler of a constant noise level; 0 is the papers' ablation "clean latents only".

    Args:
        sigma: Target sigma in [0, 1].
    """

    def __init__(self, sigma: float) -> None:
        check_range("[0, 1]", sigma=sigma)
        self.sigma = sigma

    def transform(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return torch.full_like(uniform, self.sigma)


class LogitNormalSigma(TargetSigma):
    """Sampler of noise levels u = sigmoid(mean + std·z), z standard normal (SD3, arXiv:2403.03206, eq. 19).

    Args:
        mean: Location before the sigmoid.
        std: Scale before the sigmoid, > 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        check_range("(0, inf)", std=std)
        self.mean, self.std = mean, std

    def transform(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * normal)


class ModeSigma(TargetSigma):
    """Sampler of noise levels u = 1 − U − a·(cos²(πU/2) − 1 + U), U uniform (SD3, arXiv:2403.03206, eq. 20).

    Args:
        scale: Factor a in [−1, 2/(π − 2)], for which u is monotone in U; SD3 uses 1.29.
    """

    def __init__(self, scale: float = 1.29) -> None:
        check_range(f"[-1, {2 / (math.pi - 2)}]", scale=scale)
        self.scale = scale

    def transform(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return 1 - uniform - self.scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


class PowerSigma(TargetSigma):
    """Sampler of noise levels u = U^power, U uniform: a power above 1 favours low noise, below 1 high noise.

    If the process has a table of levels, every u below the lowest level gives that level.

    Args:
        power: Exponent, > 0.
    """

    def __init__(self, power: float) -> None:
        check_range("(0, inf)", power=power)
        self.power = power

    def transform(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return uniform**self.power


class BetaSigma(TargetSigma):
    """Sampler of noise levels from the Beta(a, b) distribution, by inverting its distribution function.

    Args:
        a: First shape parameter, > 0; a smaller a favours low noise.
        b: Second shape parameter, > 0; a smaller b favours high noise.
    """

    def __init__(self, a: float, b: float) -> None:
        check_range("(0, inf)", a=a, b=b)
        self.a, self.b = a, b
        grid = torch.linspace(0, 1, 20_001, dtype=torch.float64, device="cpu")  # as random numbers
        low, high = grid[:-1], grid[1:]
        middle = (low + high) / 2
        # The density has two factors, each perhaps infinite at one end of [0, 1]. In each half, the factor of that end
        # is integrated exactly, and the other factor is taken at the middle of a cell.
        mass = torch.where(
            middle < 0.5,
            (high**a - low**a) / a * (1 - middle) ** (b - 1),
            ((1 - low) ** b - (1 - high) ** b) / b * middle ** (a - 1),
        )
        self._cdf = torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum()])
        self._grid = grid

    def transform(self, uniform: Tensor, normal: Tensor) -> Tensor:
        right = torch.searchsorted(self._cdf, uniform.double()).clamp(1, len(self._grid) - 1)
        low, high = self._cdf[right - 1], self._cdf[right]
        part = ((uniform.double() - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        return (self._grid[right - 1] + part * (self._grid[right] - self._grid[right - 1])).float()


class TimestepGrid(LevelSampler):
    """Sampler of a timestep, uniform on {start, start + step, …, stop}; the default, {1, 51, …, 951}, is LRM's.

    On a flow-matching process the nearest timestep of its table is used.

    Args:
        start: First timestep.
        stop: Last timestep, included.
        step: Distance between timesteps.
    """

    def __init__(self, start: int = 1, stop: int = 951, step: int = 50) -> None:
        if step < 1 or stop < start or start < 0:
            raise InputError(f"start={start}, stop={stop}, step={step} must satisfy 0 <= start <= stop and step >= 1")
        self.grid = torch.arange(start, stop + 1, step, dtype=torch.float32, device="cpu")  # as random numbers

    def draw(self, generator: Generator, process: NoiseProcess) -> Tensor:
        index = torch.randint(len(self.grid), (1,), generator=generator)
        return process.snap(self.grid[index])
