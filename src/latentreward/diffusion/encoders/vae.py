"""Encoders of pictures: pixels into latents, and pictures that prompts edit into latents beside the noisy ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Conditioning, EditPrompt, ImageRef, LatentSpace, sources_of
from latentreward.core.errors import InputError
from latentreward.core.promises import Kind, Part, finite, returns, wrong_tensor
from latentreward.core.storage.digests import digest, size_and_time
from latentreward.core.storage.json_files import entries, entry
from latentreward.data import ImageError, PixelLoader, decode_image
from latentreward.data.images import MAX_PIXELS, grey_picture, read_header, to_pixels
from latentreward.diffusion.encoders.prompts import PromptEncoder, encode_texts

SD_SCALING_FACTOR = 0.18215  # scaling factor of the VAE of SD1.5 and SD2.1, diffusers' default


def _wrong_latents(found: Tensor, vae: LatentEncoder, pixels: Tensor, *given: Any) -> str | None:
    return wrong_tensor(found, (len(pixels), *vae.latent_shape(pixels)))


def _wrong_pixels(found: Tensor, vae: LatentEncoder, latents: Tensor) -> str | None:
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
        """Return the latent space that a config of the VAE describes."""
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

    @classmethod
    def space_in(cls, pipeline: Any) -> LatentSpace:
        """Return the latent space of a pipeline's VAE, from its configs."""
        return cls.space_of(pipeline.config("vae"), f"source={pipeline.source!r}: vae")

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
        """Decode scaled latents ``(B, C, ...)`` differentiably into float32 pixels in about [-1, 1].

        Pixels are ``(B, 3, H, W)`` for images, also in a space with a time axis, and ``(B, 3, F, H, W)`` for clips.
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
        channels = entry(vae_config, "z_dim", int, name)
        halvings = entries(vae_config, "temperal_downsample", bool, name)
        means, stds = (tuple(map(float, entries(vae_config, f"latents_{of}", float, name))) for of in ("mean", "std"))
        if not len(means) == len(stds) == channels or 0 in stds:
            raise InputError(
                f"{name} has z_dim={channels}, but {len(means)} latents_mean and {len(stds)} latents_std (none may be "
                "0); download the VAE again"
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

    @staticmethod
    def arranged(features: Tensor) -> Tensor:
        """Bring statistics of the VAE's batch norm into the order of the latents' channels."""
        return features

    @classmethod
    def space_in(cls, pipeline: Any) -> LatentSpace:
        config, name = pipeline.config("vae"), f"source={pipeline.source!r}: vae"
        channels = 4 * entry(config, "latent_channels", int, name)
        halvings = len(entries(config, "block_out_channels", int, name))
        eps = float(entry(config, "batch_norm_eps", float, name, 1e-4))
        read = pipeline.tensors("vae", ["bn.running_mean", "bn.running_var"])
        values = [cls.arranged(one.detach()).to("cpu", torch.float32).contiguous().numpy() for one in read]
        return LatentSpace(channels, 2**halvings, statistics=digest([*values, repr(eps)]))

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        read = (self.arranged(value) for value in (norm.running_mean, norm.running_var))
        mean, variance = (value.to(like).view(1, -1, 1, 1) for value in read)
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def scale(self, sample: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(sample, 2)
        mean, std = self._constants(patches)
        return (patches - mean) / std

    def unscale(self, latents: Tensor) -> Tensor:
        mean, std = self._constants(latents)
        return F.pixel_shuffle(latents * std + mean, 2)


KEPT = 512  # number of pictures whose latents are kept: of 1024² pixels in 16 channels, 0.5 GB of CPU memory


class SourceSize(NamedTuple):
    """Size that a pipeline gives to a picture that it edits."""

    resized: tuple[int, int]  # (height, width) in pixels to which the whole picture is resized
    cropped: tuple[int, int] | None = None  # (height, width) of the centre that is then kept; None for all


@contextmanager
def reading_pictures() -> Iterator[None]:
    """Tell what to do about a picture of a list of prompts that cannot be read."""
    try:
        yield
    except ImageError as error:
        told = f"picture to edit of a prompt: {error}; replace the file, or leave its rows out of the prompts"
        raise ImageError(told, error.problem) from error


def resized_picture(image: ImageRef, size: Callable[[int, int], SourceSize]) -> Image.Image:
    """Decode a picture, and resize and crop it as ``size``, a function of height and width, says."""
    decoded = decode_image(image, image.max_pixels or MAX_PIXELS, image.exif)
    resized, cropped = size(decoded.height, decoded.width)
    decoded = decoded.resize(resized[::-1], Image.Resampling.LANCZOS)
    if cropped is not None:
        top, left = (resized[0] - cropped[0]) // 2, (resized[1] - cropped[1]) // 2
        decoded = decoded.crop((left, top, left + cropped[1], top + cropped[0]))
    return decoded


def picture_sides(image: ImageRef) -> tuple[int, int]:
    """Return (height, width) of a picture in pixels from its header; raise ImageError if it cannot be read."""
    return read_header(image, image.max_pixels or MAX_PIXELS, image.exif)[:2]


class SourceEncoder:
    """Encoder of pictures that prompts edit into clean latents: the mode of the VAE's posterior.

    Pictures are encoded one by one, so that the last bits of a picture's latents do not depend on the batch. The
    latents of the last :data:`KEPT` pictures that were read are kept in CPU memory.

    Args:
        vae: Encoder of the network's latent space.
        size: Function that returns the pipeline's size for a picture of (height, width) pixels.

    Attributes:
        loader: Decoder that resizes every picture to the size of the pictures that are made, as editors are trained;
            None resizes each as the pipeline does.
    """

    def __init__(self, vae: LatentEncoder, size: Callable[[int, int], SourceSize]) -> None:
        self.vae, self.size = vae, size
        self.loader: PixelLoader | None = None
        self._kept: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def resize_to(self, height: int, width: int) -> None:
        """Resize every picture, around its centre, to ``height`` × ``width`` pixels."""
        self.loader = PixelLoader(height, width, "center_crop", exif="apply")

    def pixels(self, image: ImageRef) -> Tensor:
        """Decode and resize a picture to pixels ``(3, H, W)`` in [-1, 1]."""
        if self.loader is not None:
            return replace(self.loader, max_pixels=image.max_pixels or self.loader.max_pixels)(image)
        return to_pixels(resized_picture(image, self.size))

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        device = next(self.vae.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.vae.encode(pixels[None].to(device))[0]

    def key(self, image: ImageRef) -> tuple[Any, ...]:
        """Return a key of a picture's latents, without its bytes; a file that is written again has another."""
        return image.identity, image.path and size_and_time(image.path), self.loader

    @torch.inference_mode(False)  # what is kept may become part of a graph later
    def latents(self, image: ImageRef) -> Tensor:
        """Return a picture's latents ``(C, ...)`` on the CPU."""
        key = self.key(image)
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._kept[key] = self._encode(self.pixels(image)).cpu()
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]

    def __call__(self, prompts: Sequence[str], pixels: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Return the latents ``(B, C, ...)`` of each picture that B prompts edit, in the order of the pictures.

        Args:
            prompts: B prompts with equally many pictures.
            pixels: Pixels ``(B, 3, H, W)`` of each picture, resized; empty reads those of the prompts.
        """
        if pixels:
            return tuple(torch.stack([*map(self._encode, place)]) for place in pixels)
        rows = [sources_of(prompt) for prompt in prompts]
        if len(counts := {len(row) for row in rows}) > 1:
            few, many = min(counts), max(counts)
            raise InputError(f"prompts that edit {few} and {many} pictures are in one batch; give lists of one number")
        found = []
        for images in zip(*rows, strict=True):
            latents = [*map(self.latents, images)]
            if len({one.shape for one in latents}) > 1:
                raise InputError(
                    "pictures to edit of unlike sizes are in one batch; set source_size: made, or one prompt at a time"
                )
            found.append(torch.stack(latents))
        return tuple(found)


def edit_of_grey(text: str = "", number: int = 1) -> EditPrompt:
    """Return a prompt that edits ``number`` grey pictures, to try a network that edits."""
    return EditPrompt(text, [grey_picture()] * number)


def encode_edits(
    text_encoder: PromptEncoder,
    prompts: Sequence[str],
    encoder: SourceEncoder | None,
    sources: Sequence[Tensor] = (),
    latents: bool = False,
) -> Conditioning:
    """Encode B prompts, and the pictures that they edit, to B rows; see :meth:`DiffusionBackbone.encode_prompts`."""
    conditioning = encode_texts(text_encoder, prompts)
    edit = next((prompt for prompt in prompts if sources_of(prompt)), None)
    if edit is None:
        return conditioning
    if encoder is None:
        raise InputError(
            f"the prompt {str(edit)[:80]!r} edits a picture, but the network makes pictures from text alone; give a "
            "network that edits, or prompts without pictures"
        )
    device = conditioning.prompt_embeds.device
    found = sources if latents else encoder(prompts, sources)
    return replace(conditioning, source_latents=tuple(one.to(device) for one in found))
