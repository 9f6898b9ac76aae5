"""Rectified flow, the forward process of SD3 and SD3.5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentreward.noise.base import NoiseProcess, per_sample
from latentreward.noise.predictions import predicted_clean


class FlowMatching(NoiseProcess):
    """Flow matching ``x_σ = (1 − σ) x_0 + σ ε`` (arXiv:2209.03003; SD3: arXiv:2403.03206), with shifted levels.

    With ``shift`` s the j-th of T levels is ``s·r / (1 + (s − 1)·r)``, r = j / T, j = 1, …, T. The lowest level is not
    0 (0.002994 for shift 3 and 1000 levels): latents are never scored without any noise.

    Args:
        num_train_timesteps: Number of levels T; timesteps are T·σ.
        shift: Time shift; SD3 and SD3.5 use 3.
    """

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 3.0) -> None:
        ratio = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32) / num_train_timesteps
        self.sigmas = shift * ratio / (1 + (shift - 1) * ratio)
        self.timesteps = self.sigmas * num_train_timesteps

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FlowMatching":
        """Build the process from the config of a ``FlowMatchEulerDiscreteScheduler``."""
        return cls(config.get("num_train_timesteps", 1000), config.get("shift", 1.0))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.add_noise`."""
        sigma = per_sample(self.sigma(timesteps), latents).to(latents.dtype)
        return (1.0 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.target`; returns the velocity dx/dσ = ε − x_0."""
        return noise - latents

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.clean`; returns x_σ − σ v."""
        sigma = per_sample(self.sigma(timesteps), noisy).to(noisy.dtype)
        return predicted_clean("flow", noisy, output, 1.0 - sigma, sigma)
