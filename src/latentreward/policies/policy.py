"""The policy that alignment trains: a frozen diffusion network, a trainable adapter, text encoders and VAE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from latentreward.contracts import Conditioning, LatentSpace, join_rows
from latentreward.errors import InputError
from latentreward.noise import NoiseProcess
from latentreward.policies.adapters import AdapterSwitch

if TYPE_CHECKING:
    from latentreward.encoders.prompts import PromptEncoder
    from latentreward.encoders.vae import LatentEncoder

POLICY = "policy"
"""Name of the trainable adapter in peft."""


class Policy(nn.Module, ABC):
    """A text-to-image network with a trainable adapter. Without the adapter, the network is the reference model.

    Args:
        network: diffusers U-Net or transformer, frozen, with an adapter named :data:`POLICY`.
        noise_process: Forward process that the network was trained with.
        latent_space: Latent space that the network works in.
        scheduler_config: The pipeline's saved scheduler config.
        text_encoder: Frozen prompt encoder; None if prompts are encoded elsewhere.
        vae: Frozen VAE; None if latents are never decoded.
        zero_uncond: Whether the empty prompt is encoded as zeros (SDXL's ``force_zeros_for_empty_prompt``).

    Attributes:
        source: Folder or hub id of the weights, for messages.
        adapters: Switch between the policy's adapter, a reward's adapter, and no adapter.
    """

    source: str = ""
    network: Any

    def __init__(
        self,
        network: nn.Module,
        noise_process: NoiseProcess,
        latent_space: LatentSpace,
        scheduler_config: Mapping[str, Any],
        text_encoder: PromptEncoder | None = None,
        vae: LatentEncoder | None = None,
        zero_uncond: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.noise_process, self.latent_space = noise_process, latent_space
        self.scheduler_config = dict(scheduler_config)
        self.text_encoder, self.vae, self.zero_uncond = text_encoder, vae, zero_uncond
        self.adapters = AdapterSwitch(network, POLICY)

    def train(self, mode: bool = True) -> Self:
        """Switch the dropout of the trainable adapter; frozen modules stay in evaluation mode (T5 has dropout)."""
        super().train(False)
        self.training = mode
        for name, module in self.network.named_modules():
            if name.endswith(f".lora_dropout.{POLICY}"):
                module.train(mode)
        return self

    def reference(self) -> AbstractContextManager[None]:
        """Return a context in which all adapters are off, so that the network predicts as before alignment."""
        return self.adapters.use(None)

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict noise, v or velocity ``(B, C, ...)``, as the network was trained to, at ``timesteps`` ``(B,)``."""

    def predict_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning | None,
        guidance_scale: float,
    ) -> Tensor:
        """Predict with classifier-free guidance u + s·(c − u), in one forward pass of 2·B rows, or of B rows if s = 1.

        Args:
            latents: ``(B, C, ...)``.
            timesteps: ``(B,)``.
            conditioning: Encoded prompts, B rows.
            uncond: The encoded empty prompt, one row; not used if s = 1.
            guidance_scale: s.

        Raises:
            InputError: If s is not 1 and ``uncond`` is None.
        """
        if guidance_scale == 1.0:
            return self.predict(latents, timesteps, conditioning)
        if uncond is None:
            raise InputError(
                f"guidance_scale={guidance_scale:g} needs the encoded empty prompt; give it, or set it to 1"
            )
        both = join_rows([uncond.select([0] * len(latents)), conditioning])
        output = self.predict(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
        without, with_prompt = output.chunk(2)
        return without + guidance_scale * (with_prompt - without)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts without gradient, each distinct prompt once.

        Raises:
            InputError: If the policy has no text encoder.
        """
        if self.text_encoder is None:
            raise InputError("this policy was built without a text encoder; load it from a full pipeline folder")
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        with torch.no_grad():
            return self.text_encoder(distinct).select([row[prompt] for prompt in prompts])

    def encode_uncond(self) -> Conditioning:
        """Encode the empty prompt, one row, for classifier-free guidance."""
        encoded = self.encode_prompts([""])
        if not self.zero_uncond:
            return encoded
        return Conditioning(torch.zeros_like(encoded.prompt_embeds), torch.zeros_like(encoded.pooled_prompt_embeds))

    @property
    def side_multiple(self) -> int:
        """Number of pixels of which both sides of an image must be multiples."""
        return self.latent_space.downscale * self.patch_size()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return the shape ``(C, h, w)`` of one image's latents.

        Args:
            height: Height in pixels; None takes the network's native height.
            width: Width in pixels; None takes the network's native width.

        Raises:
            InputError: If a side is not a multiple of the VAE's downscale factor times :meth:`patch_size`.
        """
        sides, unit = [], self.side_multiple
        for name, side, native in zip(("height", "width"), (height, width), self.native_size(), strict=True):
            pixels = native * self.latent_space.downscale if side is None else side
            if pixels < 1 or pixels % unit:
                raise InputError(f"{name}={side} must be a positive multiple of {unit} pixels")
            sides.append(pixels // self.latent_space.downscale)
        return self.latent_space.channels, sides[0], sides[1]

    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """Return the height and width of the latents that the network was trained with."""

    def patch_size(self) -> int:
        """Return the side of the network's patches, in latent pixels; 1 for a U-Net."""
        return 1

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """Yield the network's blocks in order, for compiling, gradient checkpointing and sharding one by one."""


class UNetPolicy(Policy):
    """A policy with a U-Net: SD1.5, SD2.1 or SDXL."""

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`Policy.predict`."""
        unet = self.network
        dtype = unet.conv_in.weight.dtype
        extra = {}
        if unet.config.addition_embed_type == "text_time":
            height, width = (float(side * self.latent_space.downscale) for side in latents.shape[-2:])
            time_ids = torch.tensor([height, width, 0.0, 0.0, height, width], device=latents.device, dtype=dtype)
            extra["added_cond_kwargs"] = {
                "text_embeds": conditioning.pooled_prompt_embeds.to(dtype),
                "time_ids": time_ids.expand(len(latents), 6),
            }
        return unet(
            latents.to(dtype), timesteps.to(latents.device), conditioning.prompt_embeds.to(dtype), **extra
        ).sample

    def native_size(self) -> tuple[int, int]:
        """See :meth:`Policy.native_size`."""
        size = self.network.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def blocks(self) -> Iterator[nn.Module]:
        """See :meth:`Policy.blocks`."""
        yield from self.network.down_blocks
        yield self.network.mid_block
        yield from self.network.up_blocks


class DiTPolicy(Policy):
    """A policy with a diffusion transformer: SD3 or SD3.5."""

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`Policy.predict`."""
        dtype = self.network.pos_embed.proj.weight.dtype
        return self.network(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            pooled_projections=conditioning.pooled_prompt_embeds.to(dtype),
            timestep=timesteps.to(latents.device),
        ).sample

    def native_size(self) -> tuple[int, int]:
        """See :meth:`Policy.native_size`."""
        return self.network.config.sample_size, self.network.config.sample_size

    def patch_size(self) -> int:
        """See :meth:`Policy.patch_size`."""
        return self.network.config.patch_size

    def blocks(self) -> Iterator[nn.Module]:
        """See :meth:`Policy.blocks`."""
        yield from self.network.transformer_blocks
