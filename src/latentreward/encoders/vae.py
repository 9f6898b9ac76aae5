"""VAE encoder and decoder with scaled latents, and the latent space of a VAE config."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentreward.contracts import LatentSpace


def latent_space_of(vae_config: Mapping[str, Any]) -> LatentSpace:
    """Return the latent space that a diffusers VAE config describes."""
    return LatentSpace(
        channels=vae_config["latent_channels"],
        downscale=2 ** (len(vae_config["block_out_channels"]) - 1),
        scaling_factor=vae_config["scaling_factor"],
        shift_factor=vae_config.get("shift_factor") or 0.0,
    )


class LatentEncoder(nn.Module):
    """Frozen VAE that returns and takes scaled latents ``z = (posterior sample − shift) · scale``.

    Args:
        vae: diffusers VAE. Images are encoded under autocast to bfloat16. Otherwise the VAE keeps its dtype and runs
            outside autocast, because SDXL's overflows in float16.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.space = latent_space_of(vae.config)

    def latent_shape(self, pixels: Tensor) -> tuple[int, int, int]:
        """Return the shape ``(C, h, w)`` of the latents of one image of ``pixels`` ``(B, 3, H, W)``."""
        height, width = pixels.shape[-2:]
        return self.space.channels, height // self.space.downscale, width // self.space.downscale

    def encode(self, pixels: Tensor, noise: Tensor | None = None, *, differentiable: bool = False) -> Tensor:
        """Encode pixels into scaled latents ``(B, C, h, w)`` in float32 or a wider type.

        Args:
            pixels: ``(B, 3, H, W)`` in [-1, 1].
            noise: ``(B, C, h, w)`` standard normal numbers for the posterior sample; None takes the posterior mean.
            differentiable: Whether gradients flow back to ``pixels``.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            device = pixels.device.type
            halved = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
            with torch.autocast(device, torch.bfloat16, enabled=halved):
                posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
            sample = posterior.mean.to(torch.promote_types(self.vae.dtype, torch.float32))
            if noise is not None:
                sample = sample + posterior.std.to(sample) * noise.to(sample)
            return (sample - self.space.shift_factor) * self.space.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents ``(B, C, h, w)`` into float32 pixels ``(B, 3, H, W)``, differentiably.

        Pixels lie in [-1, 1] but for small overshoots.
        """
        latents = latents / self.space.scaling_factor + self.space.shift_factor
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float()
