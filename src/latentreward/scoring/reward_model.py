"""A backbone and a head: noisy latents and a prompt in, a score out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentreward.backbones.base import DiffusionBackbone
from latentreward.contracts import Conditioning, Features
from latentreward.errors import InputError
from latentreward.heads import RewardHead

if TYPE_CHECKING:
    from latentreward.encoders.vae import LatentEncoder


class RewardModel(nn.Module):
    """Scores latents at any noise level.

    Args:
        backbone: Reads features.
        head: Scores them.
    """

    def __init__(self, backbone: DiffusionBackbone, head: RewardHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def encode_images(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents ``(B, C, ...)`` of ``pixels`` ``(B, 3, H, W)`` in [-1, 1]; see ``LatentEncoder.encode``."""
        return self._vae().encode(pixels, noise)

    def latent_shape(self, pixels: Tensor) -> tuple[int, ...]:
        """Shape of the latents of one image of ``pixels``, without the batch axis."""
        return self._vae().latent_shape(pixels)

    def _vae(self) -> "LatentEncoder":
        if self.backbone.vae is None:
            raise InputError("pixels were given, but this backbone has no VAE; give latents or load a full pipeline")
        return self.backbone.vae

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning | None]:
        """Conditioning of the prompts, and of the empty prompt (one row) if the head asks for it."""
        if not self.head.needs_uncond:
            return self.backbone.encode_prompts(prompts), None
        encoded = self.backbone.encode_prompts([*prompts, ""])
        return encoded.select(range(len(prompts))), encoded.select([len(prompts)])

    def take_prompts(
        self, conditioning: Conditioning, uncond: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Prompts that were encoded before, in the network's precision; the empty one only if the head asks for it."""
        dtype = next(next(self.backbone.blocks()).parameters()).dtype
        if not self.head.needs_uncond:
            return conditioning.to(dtype), None
        return conditioning.to(dtype), (self.backbone.encode_prompts([""]) if uncond is None else uncond).to(dtype)

    def read(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, uncond: Conditioning | None = None
    ) -> Features:
        """Features of ``noisy_latents`` ``(B, C, ...)`` at ``timesteps`` ``(B,)``."""
        return self.backbone(noisy_latents, timesteps, conditioning, uncond)

    def forward(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, uncond: Conditioning | None = None
    ) -> Tensor:
        """Scores ``(B,)`` or ``(B, out_dim)`` of latents that already are at ``timesteps``."""
        return self.head(self.read(noisy_latents, timesteps, conditioning, uncond))

    def score_latents(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor, noise: Tensor) -> Tensor:
        """Scores of clean ``latents``, noised here; several levels give one ensemble score.

        Args:
            latents: ``(B, C, ...)`` clean and scaled.
            prompts: B prompts.
            timesteps: ``(K,)`` noise levels shared by the batch; K > 1 makes an ensemble.
            noise: ``(B, C, ...)``, the same at every level.

        Raises:
            InputError: If a timestep lies outside the noise process.
        """
        conditioning, uncond = self.encode_prompts(prompts)
        levels = []
        for timestep in timesteps:
            repeated = timestep.repeat(len(latents))
            noisy = self.backbone.noise_process.add_noise(latents, noise, repeated)
            levels.append(self.read(noisy, repeated, conditioning, uncond))
        return self.head(levels[0]) if len(levels) == 1 else self.head.score_ensemble(levels)


def normalise_score(raw: Tensor) -> Tensor:
    """``(raw + 10) / 10``: the scale on which DiNa-LRM reports its scores."""
    return (torch.as_tensor(raw) + 10) / 10
