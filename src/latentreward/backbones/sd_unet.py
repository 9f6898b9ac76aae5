"""Backbone from the U-Net of SD1.5, SD2.1 or SDXL: its down and mid blocks, or all of it for the output map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentreward.backbones.base import DiffusionBackbone, check_taps
from latentreward.backbones.loading import check_sample_size
from latentreward.backbones.tuning import freeze
from latentreward.contracts import Conditioning, Features, FeatureSpec, LatentSpace, TapSpec
from latentreward.errors import InputError
from latentreward.noise import NoiseProcess

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class SDUNetBackbone(DiffusionBackbone):
    """Down path and mid block of a Stable Diffusion U-Net; the up path is dropped unless the output map is read.

    Visual tap 0 is the output of the input convolution. Tap i is the i-th down block's output after its last layer and
    before its downsampler. The last tap is the mid block's output (LRM, arXiv:2502.01051, section 3.1). The U-Net does
    not change its text tokens, so that the only text tap is 0: the prompt embeddings themselves.

    A U-Net that projects its prompt embeddings first (``encoder_hid_proj``, as Kolors') needs a subclass whose
    :meth:`read` does so. SDXL's size conditioning (``time_ids``) is :attr:`native_size`, whatever the latents' size.

    Args:
        unet: diffusers U-Net; the up path and blocks after the last tap are removed from this object.
        noise_process: See :class:`DiffusionBackbone`.
        latent_space: See :class:`DiffusionBackbone`.
        visual_taps: Numbers of the blocks to read, ascending; None reads every down block and the mid block.
        text_taps: ``(0,)`` or empty.
        options: ``text_encoder``, ``vae`` and ``output_map``, see :class:`DiffusionBackbone`.

    Raises:
        InputError: If a tap is not one of the network's blocks, or the network's ``sample_size`` is not valid.
    """

    network_name = "unet"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        noise_process: NoiseProcess,
        latent_space: LatentSpace,
        visual_taps: Sequence[int] | None = None,
        text_taps: Sequence[int] = (0,),
        **options: Any,
    ) -> None:
        super().__init__(noise_process, latent_space, **options)
        check_sample_size(unet.config.sample_size)
        self._mid = len(unet.down_blocks) + 1
        taps = range(1, self._mid + 1) if visual_taps is None else visual_taps
        self.visual_taps = check_taps("visual_taps", taps, self._mid, least=1)
        self.text_taps = check_taps("text_taps", text_taps, 0)
        self.unet = unet
        if not self.output_map:
            # Every remaining parameter contributes to a feature, so that DDP finds no unused parameters.
            unet.up_blocks = nn.ModuleList()
            unet.conv_norm_out, unet.conv_act, unet.conv_out = None, None, nn.Identity()
            unet.num_upsamplers = 0
            last = self.visual_taps[-1]
            if last < self._mid:
                unet.mid_block = None
                unet.down_blocks = unet.down_blocks[:last]
                if last:
                    unet.down_blocks[-1].downsamplers = None

    @property
    def feature_spec(self) -> FeatureSpec:
        """See :attr:`DiffusionBackbone.feature_spec`; grids are for the U-Net's native latent size."""
        config, encoder = self.unet.config, self.text_encoder
        width, size = config.cross_attention_dim, self._native_size()
        length, pooled = (77, width) if encoder is None else (encoder.num_tokens, encoder.pooled_dim)
        levels = [config.block_out_channels[0], *config.block_out_channels, config.block_out_channels[-1]]
        shrink = [0, *range(self._mid - 1), self._mid - 2]
        return FeatureSpec(
            visual=tuple(
                TapSpec(levels[tap], tuple(-(-side >> shrink[tap]) for side in size)) for tap in self.visual_taps
            ),
            text=tuple(TapSpec(width, (length,)) for _ in self.text_taps),
            temb_dim=self.unet.time_embedding.linear_2.out_features,
            pooled_text_dim=pooled,
            output=TapSpec(config.out_channels, size) if self.output_map else None,
        )

    @property
    def native_size(self) -> tuple[int, int]:
        """See :attr:`DiffusionBackbone.native_size`."""
        height, width = self._native_size()
        return height * self.latent_space.downscale, width * self.latent_space.downscale

    def drop_text_taps(self) -> None:
        """See :meth:`DiffusionBackbone.drop_text_taps`."""
        self.text_taps = ()
        attends = any(getattr(block, "has_cross_attention", False) for block in self.blocks())
        if self.text_encoder is not None and not attends:
            freeze(self.text_encoder, self.text_encoder.tokens_only)

    def drop_time_embedding(self) -> None:
        """See :meth:`DiffusionBackbone.drop_time_embedding`; nothing is frozen if any block is kept."""
        if not any(True for _ in self.blocks()):
            self.unet.time_embedding.requires_grad_(False)
            if self.unet.config.addition_embed_type == "text_time":
                self.unet.add_embedding.requires_grad_(False)

    def _native_size(self) -> tuple[int, int]:
        return check_sample_size(self.unet.config.sample_size)

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        """See :meth:`DiffusionBackbone.read`; latents ``(B, 4, h, w)``; InputError for tokens of other width."""
        unet = self.unet
        sample = beside_sources(unet, latents, conditioning, self.latent_space).to(unet.conv_in.weight.dtype)
        tokens = conditioning.prompt_embeds.to(sample.dtype)
        width = unet.config.cross_attention_dim
        if isinstance(width, int) and tokens.shape[-1] != width:
            remedy = "give the text encoder of its pipeline"
            if unet.config.encoder_hid_dim_type is not None:
                remedy = "project them by its encoder_hid_proj in the method read of a subclass"
            raise InputError(f"prompt_embeds are {tokens.shape[-1]} wide, but the U-Net attends to {width}; {remedy}")
        temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps))
        if unet.config.addition_embed_type == "text_time":
            height, width = (float(side) for side in self.native_size)
            # SDXL's size conditioning as in training of LRM-SDXL: original size native, no crop, target size native.
            sizes = [height, width, 0.0, 0.0, height, width]
            temb = temb + unet.get_aug_embed(
                emb=temb,
                encoder_hidden_states=tokens,
                added_cond_kwargs={
                    "text_embeds": conditioning.pooled_prompt_embeds.to(sample.dtype),
                    "time_ids": sample.new_tensor(sizes).expand(len(sample), 6),
                },
            )
        sample = unet.conv_in(sample)
        last = self._mid if self.output_map else self.visual_taps[-1]
        read, skips = {0: sample}, [sample]
        for number, block in enumerate(unet.down_blocks[:last], start=1):
            sample, outputs = block(hidden_states=sample, temb=temb, **attended(block, tokens))
            read[number] = outputs[len(block.resnets) - 1]
            skips += outputs
        if last == self._mid:
            read[self._mid] = unet.mid_block(sample, temb, encoder_hidden_states=tokens)
        maps = [read[tap] for tap in self.visual_taps]
        return Features(
            visual=tuple(features.flatten(2).transpose(1, 2) for features in maps),
            visual_grids=tuple(tuple(features.shape[2:]) for features in maps),
            text=(tokens,) * len(self.text_taps),
            pooled_text=conditioning.pooled_prompt_embeds,
            temb=temb,
            output=self._output(read[self._mid], skips, temb, tokens) if self.output_map else None,
        )

    def _output(self, sample: Tensor, skips: list[Tensor], temb: Tensor, tokens: Tensor) -> Tensor:
        """Run the up path on the mid block's output and the down path's outputs; returns ``(B, C, h, w)``."""
        unet = self.unet
        for block in unet.up_blocks:
            count = len(block.resnets)
            skips, taken = skips[:-count], skips[-count:]
            size = {"upsample_size": skips[-1].shape[2:]} if skips else {}  # sides that are odd before a downsampler
            sample = block(sample, tuple(taken), temb, **attended(block, tokens), **size)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))

    def blocks(self) -> Iterator[nn.Module]:
        """See :meth:`DiffusionBackbone.blocks`."""
        yield from self.unet.down_blocks
        if self.unet.mid_block is not None:
            yield self.unet.mid_block
        yield from self.unet.up_blocks


def beside_sources(unet: Any, latents: Tensor, conditioning: Conditioning, space: LatentSpace) -> Tensor:
    """Join noisy latents ``(B, C, h, w)`` and those of the picture to edit, on the channel axis.

    InstructPix2Pix takes the mode of the VAE's posterior as it is, without the scaling of other latents
    (arXiv:2211.09800, released code). A U-Net that edits no picture gets ``latents`` back.

    Raises:
        InputError: If there are more or fewer sources than the U-Net takes, or a source has another size.
    """
    sources, taken = conditioning.source_latents, unet.config.in_channels // space.channels - 1
    if len(sources) != taken:
        raise InputError(f"the U-Net takes {taken} picture{'s' * (taken != 1)} to edit, and {len(sources)} were given")
    for source in sources:
        if source.shape[2:] != latents.shape[2:]:
            found, made = (
                " × ".join(str(side * space.downscale) for side in one.shape[2:]) for one in (source, latents)
            )
            raise InputError(
                f"the picture to edit has {found} pixels and the one that is made {made}, which a U-Net needs to be "
                "equal; set source_size: made"
            )
    return torch.cat([latents, *(source / space.scaling_factor for source in sources)], dim=1) if sources else latents


def attended(block: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Return the argument with the text tokens, for a block that attends to them."""
    return {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}


def check_undistilled(source: str, config: Mapping[str, Any]) -> None:
    """Raise InputError if a U-Net takes the guidance scale as an input, as distilled ones do (LCM)."""
    if config.get("time_cond_proj_dim") is not None:
        raise InputError(
            f"source={source!r} holds a U-Net with time_cond_proj_dim, distilled to few steps with guidance inside "
            "(LCM); give the model that it was distilled from"
        )


def unet_family(config: dict[str, Any]) -> str:
    """Return the model family of a U-Net config: ``SDXL``, ``SD2.1`` or ``SD1.5``."""
    if config.get("addition_embed_type") == "text_time":
        return "SDXL"
    return "SD2.1" if config.get("cross_attention_dim") == 1024 else "SD1.5"
