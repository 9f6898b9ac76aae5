"""Variance-preserving diffusion, the forward process of SD1.5, SD2.1 and SDXL."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentreward.core.errors import InputError
from latentreward.diffusion.noise.base import NoiseProcess, per_sample, predicted_clean
from latentreward.diffusion.noise.schedules import make_scheduler


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
        """Build the process from the config of a diffusers DDPM-family scheduler (DDIM, PNDM, Euler, ...).

        Raises:
            InputError: If the scheduler refuses the config, such as an unknown ``beta_schedule``.
        """
        from diffusers import DDPMScheduler

        scheduler = make_scheduler(DDPMScheduler, {**config, "thresholding": False}, 1)
        return cls(scheduler.alphas_cumprod, config.get("prediction_type", "epsilon"))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.add_noise`; timesteps are whole numbers 0..T−1."""
        signal, spread = self._factors(latents, timesteps)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.target`; returns the noise ε, or v = √ᾱ ε − √(1 − ᾱ) x_0."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._factors(latents, timesteps)
        return signal * noise - spread * latents

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`NoiseProcess.clean`; returns (x_t − √(1 − ᾱ) ε) / √ᾱ, or √ᾱ x_t − √(1 − ᾱ) v."""
        return predicted_clean(self.prediction_type, noisy, output, *self._factors(noisy, timesteps))

    def _factors(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return √ᾱ and √(1 − ᾱ) at ``timesteps``, shaped to multiply ``latents``."""
        # ᾱ is in ascending order of t, timesteps and sigmas are in descending order.
        alpha_bar = self.alphas_cumprod[len(self.timesteps) - 1 - self._index(timesteps)]
        signal, spread = per_sample(alpha_bar.sqrt(), latents), per_sample((1.0 - alpha_bar).sqrt(), latents)
        return signal.to(latents.dtype), spread.to(latents.dtype)
