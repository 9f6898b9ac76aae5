"""Interface of the forward processes, which mix latents with noise, and what follows from a network's output.

A state is a·x_0 + s·ε. Flow matching has a = 1 − σ, s = σ; DDPM a = √ᾱ, s = √(1 − ᾱ); Euler's sampler a = 1, s = σ.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from latentreward.core.errors import InputError
from latentreward.core.promises import Part, finite, returns, wrong_tensor

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

    needs = ("timesteps", "sigmas")
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
        """Return the index ``(B,)`` of the level nearest to each wanted noise level ``u`` ``(B,)``.

        Of two equally near levels the first, noisier one is taken. Values outside [0, 1] give the ends of the table.
        """
        # argmin returns the first of equal distances, and the table begins with the most noise.
        return (self.sigmas - u.to(torch.float32).cpu()[:, None]).abs().argmin(dim=1)

    def timesteps_at(self, u: Tensor) -> Tensor:
        """Return the timesteps ``(B,)`` float32 with the levels nearest to the wanted noise levels ``u`` ``(B,)``."""
        return self.timesteps[self.nearest(u)]

    def snap(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps of the table nearest to ``timesteps`` ``(B,)``, e.g. of a grid for another process.

        Raises:
            InputError: If a timestep lies outside the table.
        """
        return self.timesteps[self._index(timesteps)]

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Return the noise levels ``(B,)`` float32 at ``timesteps`` ``(B,)``, on the device of ``timesteps``.

        Raises:
            InputError: If a timestep lies outside the table.
        """
        return self.sigmas[self._index(timesteps)].to(timesteps.device)

    def _index(self, timesteps: Tensor) -> Tensor:
        values = self._in_range(timesteps.detach().to("cpu", torch.float32))
        return (self.timesteps - values[:, None]).abs().argmin(dim=1)

    def _in_range(self, timesteps: Tensor) -> Tensor:
        """Return timesteps; raise InputError if one lies outside the table."""
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
    """Compute the clean latents x̂_0 that a network predicts for ``states``.

    Args:
        kind: What the network predicts: ``epsilon``, ``v_prediction`` (arXiv:2202.00512) or ``flow``, the velocity
            ε − x_0.
        states: ``(B, C, ...)`` noisy latents.
        output: ``(B, C, ...)`` the network's output for ``states``.
        signal: Factor a of the state, broadcastable over ``states``.
        spread: Factor s of the state, broadcastable over ``states``.
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

    Args:
        level: (a², s²) before the step.
        following: (a'², s'²) after the step.
        eta: η.
    """
    (signal, spread), (next_signal, next_spread) = level, following
    return eta**2 * next_spread / spread * (spread - signal * next_spread / next_signal)
