"""VAE encoder and decoder with scaled latents, and the latent space of a VAE config."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import LatentSpace
from latentreward.core.errors import InputError
from latentreward.core.promises import Kind, Part, finite, returns, wrong_tensor
from latentreward.core.storage.json_files import entries, entry

SD_SCALING_FACTOR = 0.18215  # scaling factor of the VAE of SD1.5 and SD2.1, diffusers' default


def _wrong_latents(found: Tensor, vae: "LatentEncoder", pixels: Tensor, *given: Any) -> str | None:
    return wrong_tensor(found, (len(pixels), *vae.latent_shape(pixels)))


def _wrong_pixels(found: Tensor, vae: "LatentEncoder", latents: Tensor) -> str | None:
    height, width = (side * vae.space.downscale for side in latents.shape[-2:])
    frames = (-1,) * (isinstance(found, Tensor) and found.ndim == 5)
    values: Kind = "numbers" if finite(latents) else "floats"
    return wrong_tensor(found, (len(latents), 3, *frames, height, width), values)


class LatentEncoder(nn.Module, Part):
    """Frozen VAE that returns and takes scaled latents ``z = (posterior sample − shift) · scale``.

    Derived classes have other codecs, see :class:`~latentreward.core.contracts.LatentSpace`.

    Args:
        vae: diffusers VAE. Images are encoded under autocast to bfloat16. Otherwise the VAE keeps its dtype and runs
            outside autocast, because SDXL's overflows in float16.
        space: Space of the latents; None reads it from the VAE's config.
    """

    def __init__(self, vae: Any, space: LatentSpace | None = None) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.space = self.space_of(vae.config) if space is None else space

    @classmethod
    def space_of(cls, vae_config: Mapping[str, Any], name: str = "the VAE's config") -> LatentSpace:
        """Return the latent space that a config of the VAE describes.

        Raises:
            InputError: If an entry is missing or wrong, latents would be scaled by 0, or the config has a mean or
                standard deviation of each channel (Playground v2.5), which this encoder does not apply.
        """
        for field in ("latents_mean", "latents_std"):
            if vae_config.get(field) is not None:
                raise InputError(f"{name} has {field}, a number for each channel, which is not supported")
        channels = entry(vae_config, "latent_channels", int, name)
        # Configs of SD1.5 and SD2.1 from before diffusers had the entry lack it.
        usual = SD_SCALING_FACTOR if channels == 4 else None
        space = LatentSpace(
            channels=channels,
            downscale=2 ** (len(entries(vae_config, "block_out_channels", int, name)) - 1),
            # As float also where the config has a whole number: hashes of caches tell 0 from 0.0.
            scaling_factor=float(entry(vae_config, "scaling_factor", float, name, usual)),
            shift_factor=float(entry(vae_config, "shift_factor", float, name, default=0.0)),
        )
        if not space.scaling_factor:
            raise InputError(f"{name} has scaling_factor=0, which makes all latents 0; get the pipeline as published")
        return space

    def latent_shape(self, pixels: Tensor) -> tuple[int, ...]:
        """Return the shape of the latents of one row of ``pixels`` ``(B, 3, H, W)`` or ``(B, 3, F, H, W)``."""
        return self.space.shape(pixels.shape[-2], pixels.shape[-1], pixels.shape[2] if pixels.ndim == 5 else 1)

    @returns(_wrong_latents)
    def encode(self, pixels: Tensor, noise: Tensor | None = None, *, differentiable: bool = False) -> Tensor:
        """Encode pixels into scaled latents ``(B, C, ...)`` in float32 or a wider type.

        Args:
            pixels: ``(B, 3, H, W)`` in [-1, 1]; in a space with a time axis also clips ``(B, 3, F, H, W)``.
            noise: ``(B, C, ...)`` standard normal numbers for the posterior sample; None takes the posterior mean.
            differentiable: Whether gradients flow back to ``pixels``.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            device = pixels.device.type
            halved = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
            with torch.autocast(device, torch.bfloat16, enabled=halved):
                posterior = self.vae.encode(self.to_vae(pixels).to(self.vae.dtype)).latent_dist
            sample = posterior.mean.to(torch.promote_types(self.vae.dtype, torch.float32))
            if noise is not None:
                sample = sample + posterior.std.to(sample) * self.unpacked(noise).to(sample)
            return self.scale(sample)

    @returns(_wrong_pixels)
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents ``(B, C, ...)`` into float32 pixels, differentiably.

        Pixels are ``(B, 3, H, W)`` for images, also in a space with a time axis, and ``(B, 3, F, H, W)`` for clips.
        They lie in [-1, 1] but for small overshoots.
        """
        latents = self.unscale(latents)
        with torch.autocast(latents.device.type, enabled=False):
            return self.decode_raw(latents.to(self.vae.dtype)).float()

    def to_vae(self, pixels: Tensor) -> Tensor:
        """Return pixels with the axes that the VAE takes."""
        return pixels

    def unpacked(self, noise: Tensor) -> Tensor:
        """Return noise in the shape of scaled latents in the shape of the VAE's posterior."""
        return noise

    def scale(self, sample: Tensor) -> Tensor:
        """Scale a sample of the VAE's posterior."""
        return (sample - self.space.shift_factor) * self.space.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """Undo :meth:`scale`."""
        return latents / self.space.scaling_factor + self.space.shift_factor

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents."""
        pixels: Tensor = self.vae.decode(latents).sample
        return pixels


class ChannelLatentEncoder(LatentEncoder):
    """Frozen VAE of clips with a mean and a standard deviation per channel (Wan 2.1, Qwen-Image).

    An image is a clip of one frame. The VAEs clamp decoded pixels to [-1, 1], where the gradient would vanish. Here
    gradients pass as if the pixels were not clamped.
    """

    @classmethod
    def space_of(cls, vae_config: Mapping[str, Any], name: str = "the VAE's config") -> LatentSpace:
        """See :meth:`LatentEncoder.space_of`; means and standard deviations must fit the number of channels."""
        channels = entry(vae_config, "z_dim", int, name)
        halvings = entries(vae_config, "temperal_downsample", bool, name)
        means, stds = (tuple(map(float, entries(vae_config, f"latents_{of}", float, name))) for of in ("mean", "std"))
        if not len(means) == len(stds) == channels:
            raise InputError(
                f"{name} has z_dim={channels}, but {len(means)} latents_mean and {len(stds)} latents_std; download the "
                "VAE again"
            )
        if 0 in stds:
            raise InputError(
                f"{name} has a latents_std of 0, by which latents cannot be divided; download the VAE again"
            )
        return LatentSpace(channels, 2 ** len(halvings), frame_downscale=2 ** sum(halvings), means=means, stds=stds)

    def to_vae(self, pixels: Tensor) -> Tensor:
        return pixels.unsqueeze(2) if pixels.ndim == 4 else pixels

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        means, stds = (like.new_tensor(values).view(-1, 1, 1, 1) for values in (self.space.means, self.space.stds))
        return means, stds

    def scale(self, sample: Tensor) -> Tensor:
        mean, std = self._constants(sample)
        return (sample - mean) / std

    def unscale(self, latents: Tensor) -> Tensor:
        mean, std = self._constants(latents)
        return latents * std + mean

    def decode_raw(self, latents: Tensor) -> Tensor:
        parts: list[Tensor] = []
        hook = self.vae.decoder.register_forward_hook(lambda module, args, output: parts.append(output))
        try:
            clamped = self.vae.decode(latents).sample  # the decoder is called once per latent frame
        finally:
            hook.remove()
        raw = torch.cat(parts, dim=2)
        pixels: Tensor = clamped.detach() + (raw - raw.detach())
        return pixels.squeeze(2) if pixels.shape[2] == 1 else pixels


class PatchedLatentEncoder(LatentEncoder):
    """Frozen VAE whose latents are 2×2 patches in the channels, normalised by the VAE's batch norm (FLUX.2).

    The order of the channels is (c, dy, dx). Images are encoded to the posterior's mode in FLUX.2's pipelines.
    """

    def unpacked(self, noise: Tensor) -> Tensor:
        return F.pixel_shuffle(noise, 2)

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        mean, variance = (value.to(like).view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def scale(self, sample: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(sample, 2)
        mean, std = self._constants(patches)
        return (patches - mean) / std

    def unscale(self, latents: Tensor) -> Tensor:
        mean, std = self._constants(latents)
        return F.pixel_shuffle(latents * std + mean, 2)
