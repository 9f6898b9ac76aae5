"""Rectified flow, the forward process of SD3 and SD3.5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentreward.core.errors import check_range, errors_at
from latentreward.core.storage.json_files import entry
from latentreward.diffusion.noise.base import NoiseProcess, per_sample, predicted_clean
from latentreward.diffusion.noise.schedules import NAME


class FlowMatching(NoiseProcess):
    """Flow matching ``x_σ = (1 − σ) x_0 + σ ε`` (arXiv:2209.03003; SD3: arXiv:2403.03206), with shifted levels.

    With ``shift`` s the j-th of T levels is ``s·r / (1 + (s − 1)·r)``, r = j / T, j = 1, …, T. The lowest level is not
    0 (0.002994 for shift 3 and 1000 levels): latents are never scored without any noise.

    Args:
        num_train_timesteps: Number of levels T; timesteps are T·σ.
        shift: Time shift; SD3 and SD3.5 use 3.

    Raises:
        InputError: If ``shift`` is not positive and finite.
    """

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 3.0) -> None:
        check_range("(0, inf)", shift=shift)
        ratio = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32) / num_train_timesteps
        self.sigmas = shift * ratio / (1 + (shift - 1) * ratio)
        self.timesteps = self.sigmas * num_train_timesteps

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FlowMatching":
        """Build the process from the config of a ``FlowMatchEulerDiscreteScheduler``."""
        levels = entry(config, "num_train_timesteps", int, NAME, default=1000)
        shift = entry(config, "shift", float, NAME, default=1.0)
        with errors_at(f"{NAME}: "):
            return cls(levels, shift)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        # In the type of the latents: a float32 level would make bfloat16 latents, and the network's input, float32.
        sigma = per_sample(self.sigma(timesteps), latents).to(latents.dtype)
        return (1.0 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.target`; returns the velocity dx/dσ = ε − x_0."""
        return noise - latents

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.clean`; returns x_σ − σ v."""
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
