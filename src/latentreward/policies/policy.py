"""The generator that is aligned: one frozen network, adapters that train, and the encoders around it."""

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
"""Name of the adapter that trains."""


class Policy(nn.Module, ABC):
    """A text-to-image network with a trainable adapter; without it, the same network is the reference.

    Args:
        network: diffusers U-Net or transformer, frozen, with an adapter named :data:`POLICY`.
        noise_process: Forward process it was trained with.
        latent_space: Latents it takes.
        scheduler_config: The pipeline's saved scheduler config.
        text_encoder: Prompt encoder, frozen.
        vae: Latents ↔ pixels, frozen; None if nobody will decode.
        zero_uncond: Whether the empty prompt is encoded as zeros (SDXL's ``force_zeros_for_empty_prompt``).

    Attributes:
        source: Folder or hub id of the weights, for messages.
        adapters: Switch between the policy's adapter, a reward's, and none.
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
        """Switch the adapter's dropout; whatever is frozen stays in evaluation mode (T5 has dropout of its own)."""
        super().train(False)
        self.training = mode
        for name, module in self.network.named_modules():
            if name.endswith(f".lora_dropout.{POLICY}"):
                module.train(mode)
        return self

    def reference(self) -> AbstractContextManager[None]:
        """The network as it was before alignment."""
        return self.adapters.use(None)

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output ``(B, C, ...)`` for ``latents`` at ``timesteps`` ``(B,)``: noise, v or velocity."""

    def predict_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning | None,
        guidance_scale: float,
    ) -> Tensor:
        """Output with classifier-free guidance u + s·(c − u), in one pass of twice the batch; s = 1 needs one half.

        Args:
            latents: ``(B, C, ...)``.
            timesteps: ``(B,)``.
            conditioning: B rows.
            uncond: The empty prompt, one row.
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
        """Conditioning of B prompts, without gradient; each distinct prompt is encoded once."""
        if self.text_encoder is None:
            raise InputError("this policy was built without a text encoder; load it from a full pipeline folder")
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        with torch.no_grad():
            return self.text_encoder(distinct).select([row[prompt] for prompt in prompts])

    def encode_uncond(self) -> Conditioning:
        """Conditioning of the empty prompt, one row."""
        encoded = self.encode_prompts([""])
        if not self.zero_uncond:
            return encoded
        return Conditioning(torch.zeros_like(encoded.prompt_embeds), torch.zeros_like(encoded.pooled_prompt_embeds))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one image's latents; the network's native size by default.

        Raises:
            InputError: If a side is no multiple of the VAE's reduction times the network's patch.
        """
        sides, unit = [], self.latent_space.downscale * self.patch_size()
        for name, side, native in zip(("height", "width"), (height, width), self.native_size(), strict=True):
            pixels = native * self.latent_space.downscale if side is None else side
            if pixels < 1 or pixels % unit:
                raise InputError(f"{name}={side} must be a positive multiple of {unit} pixels")
            sides.append(pixels // self.latent_space.downscale)
        return self.latent_space.channels, sides[0], sides[1]

    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """Latent height and width that the network was trained with."""

    def patch_size(self) -> int:
        """Side of what the network takes as one token, in latents."""
        return 1

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of the network, in order: what is compiled, checkpointed or sharded one by one."""


class UNetPolicy(Policy):
    """SD1.5, SD2.1 and SDXL."""

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
    """SD3 and SD3.5."""

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
