"""Noise processes, which mix latents with noise, and samplers of the level at which a training pair is compared.

A state is a·x_0 + s·ε. Flow matching has a = 1 − σ, s = σ; DDPM a = √ᾱ, s = √(1 − ᾱ); Euler's sampler a = 1, s = σ.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from latentreward.core.errors import InputError, check_range, errors_at
from latentreward.core.promises import Part, finite, returns, tensor, wrong_tensor
from latentreward.core.storage.json_files import entry
from latentreward.diffusion.noise.schedules import (
    DDPM_SCHEDULERS,
    FLOW_SCHEDULERS,
    NAME,
    check_scheduler,
    make_scheduler,
)

Level = TypeVar("Level", Tensor, float)


def _wrong_latents(found: Tensor, process: "NoiseProcess", latents: Tensor, other: Tensor, at: Tensor) -> str | None:
    levels = len(process.sigmas)  # a scheduler of DDPM may have more than 1000, as Kolors' 1100
    for name, low, high in (("timesteps", 0.0, max(1000.0, levels)), ("sigmas", 0.0, 1.0)):
        table = getattr(process, name)
        if problem := wrong_tensor(table, (len(process.sigmas),), low=low, high=high):
            return f"latents by a table {name} that is {problem}"
        if (table.diff() > 0).any():
            return f"latents by a table {name} that ascends; it must be descending"
    return wrong_tensor(found, latents.shape) if finite(latents, other) else None


class NoiseProcess(Part):
    """Table of noise levels, and the rule that mixes latents with noise.

    The noise level ``sigma`` is the standard deviation of the noise in the mixture, in [0, 1] for both families: σ in
    flow matching, √(1 − ᾱ) in DDPM. Heads and losses get sigmas, networks get timesteps.

    Attributes:
        timesteps: ``(T,)`` float32, descending: the network's timesteps, 0..1000 or below T.
        sigmas: ``(T,)`` float32, descending: the noise level at each timestep.
    """

    timesteps: Tensor
    sigmas: Tensor

    @cached_property
    def highest(self) -> float:
        """Timestep of the most noise."""
        return float(self.timesteps[0])

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseProcess":
        """Build the process from a diffusers scheduler's config."""

    @abstractmethod
    @returns(_wrong_latents)
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix ``latents`` and ``noise`` ``(B, C, ...)`` to noisy latents at ``timesteps`` ``(B,)``."""

    @abstractmethod
    @returns(_wrong_latents)
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's training target for the noisy latents ``add_noise(latents, noise, timesteps)``."""

    @abstractmethod
    @returns(_wrong_latents)
    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """Predict clean latents x̂_0 from ``noisy`` latents and the network's ``output`` at ``timesteps`` ``(B,)``."""

    def nearest(self, u: Tensor) -> Tensor:
        """Return the index ``(B,)`` of the level nearest to each noise level ``u`` ``(B,)``; of two the noisier."""
        # argmin returns the first of equal distances, and the table begins with the most noise.
        return (self.sigmas - u.to(torch.float32).cpu()[:, None]).abs().argmin(dim=1)

    def timesteps_at(self, u: Tensor) -> Tensor:
        """Return the timesteps ``(B,)`` float32 with the levels nearest to the wanted noise levels ``u`` ``(B,)``."""
        return self.timesteps[self.nearest(u)]

    def snap(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps of the table nearest to ``timesteps`` ``(B,)``, e.g. of a grid for another process."""
        return self.timesteps[self._index(timesteps)]

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Return the noise levels ``(B,)`` float32 at ``timesteps`` ``(B,)``, on the device of ``timesteps``."""
        return self.sigmas[self._index(timesteps)].to(timesteps.device)

    def _index(self, timesteps: Tensor) -> Tensor:
        values = self._in_range(timesteps.detach().to("cpu", torch.float32))
        return (self.timesteps - values[:, None]).abs().argmin(dim=1)

    def _in_range(self, timesteps: Tensor) -> Tensor:
        outside = timesteps[~((timesteps >= 0) & (timesteps <= self.highest))]
        if outside.numel():
            raise InputError(f"timestep {outside[0].item():g} is out of range; use a value from 0 to {self.highest:g}")
        return timesteps


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``values`` ``(B,)`` to broadcast over ``like`` ``(B, ...)``, on the device of ``like``."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


def predicted_clean(
    kind: str, states: Tensor, output: Tensor, signal: Tensor | float, spread: Tensor | float
) -> Tensor:
    """Compute the clean latents x̂_0 that a network predicts for ``states`` a·x_0 + s·ε ``(B, C, ...)``.

    ``kind`` is what it predicts: ``epsilon``, ``v_prediction`` (arXiv:2202.00512) or ``flow``, the velocity ε − x_0.
    ``signal`` and ``spread`` are a and s, broadcastable over ``states``.
    """
    if kind == "flow":
        return states - spread * output
    if kind == "v_prediction":
        return signal * states - spread * output
    return (states - spread * output) / signal


def predicted_noise(kind: str, states: Tensor, output: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """Compute the noise ε̂ that an ``epsilon`` or ``v_prediction`` network predicts; see :func:`predicted_clean`."""
    return output if kind == "epsilon" else signal * output + spread * states


def ancestral_variance(level: tuple[Level, Level], following: tuple[Level, Level], eta: float) -> Level:
    r"""Compute the variance τ² of the noise in DDIM's step from level (a², s²) to (a'², s'²).

    The step (arXiv:2010.02502, eq. 12 and 16), with standard normal noise ξ, is

    .. math:: x' = a'\hat x_0 + \sqrt{s'^2 - \tau^2}\,\hat\varepsilon + \tau\xi, \quad
        \tau^2 = \eta^2 \frac{s'^2}{s^2}\Bigl(s^2 - \frac{a^2 s'^2}{a'^2}\Bigr)

    The marginal of x' is the same for every η in [0, 1]. η = 1 gives the posterior q(x' | x, x̂_0) of the forward
    process, η = 0 the deterministic step. A step to a clean state (s' = 0) adds no noise: τ = 0.
    """
    (signal, spread), (next_signal, next_spread) = level, following
    return eta**2 * next_spread / spread * (spread - signal * next_spread / next_signal)


class DDPM(NoiseProcess):
    r"""DDPM's process ``x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε`` (arXiv:2006.11239, eq. 4), with ``sigma = √(1 − ᾱ_t)``.

    Args:
        alphas_cumprod: ``(T,)`` cumulative products ᾱ_t, in the order of ascending t.
        prediction_type: What the network predicts: ``epsilon`` or ``v_prediction`` (arXiv:2202.00512).
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction_type {prediction_type!r} is not known; use 'epsilon' or 'v_prediction'")
        self.prediction_type = prediction_type
        self.alphas_cumprod = alphas_cumprod.to(torch.float32)
        self.timesteps = torch.arange(len(alphas_cumprod) - 1, -1, -1, dtype=torch.float32)
        self.sigmas = (1.0 - self.alphas_cumprod).sqrt().flip(0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DDPM":
        from diffusers import DDPMScheduler

        scheduler = make_scheduler(DDPMScheduler, {**config, "thresholding": False}, 1)
        return cls(scheduler.alphas_cumprod, config.get("prediction_type", "epsilon"))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, spread = self._factors(latents, timesteps)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.target`; returns the noise ε, or v = √ᾱ ε − √(1 − ᾱ) x_0."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._factors(latents, timesteps)
        return signal * noise - spread * latents

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        return predicted_clean(self.prediction_type, noisy, output, *self._factors(noisy, timesteps))

    def _factors(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # ᾱ is in ascending order of t, timesteps and sigmas are in descending order.
        alpha_bar = self.alphas_cumprod[len(self.timesteps) - 1 - self._index(timesteps)]
        signal, spread = per_sample(alpha_bar.sqrt(), latents), per_sample((1.0 - alpha_bar).sqrt(), latents)
        return signal.to(latents.dtype), spread.to(latents.dtype)


class FlowMatching(NoiseProcess):
    """Flow matching ``x_σ = (1 − σ) x_0 + σ ε`` (arXiv:2209.03003; SD3: arXiv:2403.03206), with shifted levels.

    With ``shift`` s the j-th of T levels is ``s·r / (1 + (s − 1)·r)``, r = j / T, j = 1, …, T. The lowest level is not
    0 (0.002994 for shift 3 and 1000 levels): latents are never scored without any noise.

    Args:
        num_train_timesteps: Number of levels T; timesteps are T·σ.
        shift: Time shift; SD3 and SD3.5 use 3.
    """

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 3.0) -> None:
        check_range("(0, inf)", shift=shift)
        ratio = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32) / num_train_timesteps
        self.sigmas = shift * ratio / (1 + (shift - 1) * ratio)
        self.timesteps = self.sigmas * num_train_timesteps

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FlowMatching":
        levels = entry(config, "num_train_timesteps", int, NAME, default=1000)
        shift = entry(config, "shift", float, NAME, default=1.0)
        with errors_at(f"{NAME}: "):
            return cls(levels, shift)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        # In the type of the latents: a float32 level would make bfloat16 latents, and the network's input, float32.
        sigma = per_sample(self.sigma(timesteps), latents).to(latents.dtype)
        return (1.0 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents  # the velocity dx/dσ

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        sigma = per_sample(self.sigma(timesteps), noisy).to(noisy.dtype)
        return predicted_clean("flow", noisy, output, 1.0 - sigma, sigma)


class ContinuousFlow(FlowMatching):
    """Flow matching at any level in [0, 1]: timesteps are 1000·σ, not rounded to a table.

    For networks whose pipelines shift the levels by image size or number of steps, so that no table has them all. The
    lowest level of :meth:`timesteps_at` and :meth:`snap` is 0.001: latents are never scored without any noise.
    """

    def __init__(self) -> None:
        with torch.device("cpu"):  # as all tables, whatever the default device
            super().__init__(shift=1.0)

    def timesteps_at(self, u: Tensor) -> Tensor:
        return u.to("cpu", torch.float32).clamp(0.001, 1.0) * 1000

    def snap(self, timesteps: Tensor) -> Tensor:
        return self._in_range(timesteps.to("cpu", torch.float32)).clamp(min=1.0)

    def sigma(self, timesteps: Tensor) -> Tensor:
        return self._in_range(timesteps.detach().float()) / 1000


def process_from_scheduler(
    config: dict[str, Any], taken: Sequence[str] = (*FLOW_SCHEDULERS, *DDPM_SCHEDULERS)
) -> NoiseProcess:
    """Build the noise process of a saved diffusers scheduler config: flow matching or DDPM, by its class name."""
    check_scheduler(config, taken)
    family = FlowMatching if config["_class_name"] in FLOW_SCHEDULERS else DDPM
    with torch.device("cpu"):  # the tables stay on the CPU, whatever the default device
        return family.from_config(config)


class LevelSampler(Part):
    """Sampler of the timestep of one pair, or of one image if the two images of a pair get different timesteps."""

    @abstractmethod
    @returns(lambda found, sampler, draws, process: wrong_tensor(found, (1,), high=process.highest, low=0.0), each=True)
    def draw(self, generator: Generator, process: NoiseProcess) -> Tensor:
        """Draw one timestep of ``process``, ``(1,)`` float32, with random numbers from ``generator`` alone."""


class TargetSigma(LevelSampler):
    """Base class of samplers that draw a wanted noise level u in [0, 1], to which the nearest of the process is used.

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
