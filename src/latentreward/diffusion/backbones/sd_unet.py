"""Backbone from the U-Net of SD1.5, SD2.1 or SDXL: its down and mid blocks, or all of it for the output map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, LatentSpace, TapSpec
from latentreward.core.errors import InputError
from latentreward.diffusion.backbones.base import DiffusionBackbone, FirstBlocks, check_taps, recorded
from latentreward.diffusion.backbones.loading import check_sample_size
from latentreward.diffusion.backbones.tuning import freeze
from latentreward.diffusion.noise.processes import NoiseProcess

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class SDUNetBackbone(DiffusionBackbone):
    """Down path and mid block of a Stable Diffusion U-Net; the up path is dropped unless the output map is read.

    Visual tap 0 is the output of the input convolution. Tap i is the i-th down block's output after its last layer and
    before its downsampler. The last tap is the mid block's output (LRM, arXiv:2502.01051, section 3.1). The U-Net does
    not change its text tokens, so that the only text tap is 0: the prompt embeddings themselves.

    SDXL's size conditioning (``time_ids``) is :attr:`native_size`, whatever the latents' size.

    Args:
        unet: diffusers U-Net; the up path and blocks after the last tap are removed from this object.
        noise_process: See :class:`DiffusionBackbone`.
        latent_space: See :class:`DiffusionBackbone`.
        visual_taps: Numbers of the blocks to read, ascending; None reads every down block and the mid block.
        text_taps: ``(0,)`` or empty.
        options: ``text_encoder``, ``vae`` and ``output_map``, see :class:`DiffusionBackbone`.
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
            last = self.visual_taps[-1]
            if last < self._mid:
                unet.mid_block = None
                unet.down_blocks = unet.down_blocks[:last]
                if last:
                    unet.down_blocks[-1].downsamplers = None

    @property
    def feature_spec(self) -> FeatureSpec:
        config, encoder = self.unet.config, self.text_encoder
        width, size = config.cross_attention_dim, check_sample_size(config.sample_size)
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
        height, width = check_sample_size(self.unet.config.sample_size)
        return height * self.latent_space.downscale, width * self.latent_space.downscale

    def drop_text_taps(self) -> None:
        self.text_taps = ()
        attends = any(getattr(block, "has_cross_attention", False) for block in self.blocks())
        if self.text_encoder is not None and not attends:
            freeze(self.text_encoder, self.text_encoder.tokens_only)

    def drop_time_embedding(self) -> None:
        if not [*self.blocks()]:
            self.unet.time_embedding.requires_grad_(False)
            if self.unet.config.addition_embed_type == "text_time":
                self.unet.add_embedding.requires_grad_(False)

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        """See :meth:`DiffusionBackbone.read`; latents ``(B, 4, h, w)``; InputError for tokens of other width."""
        unet, pooled, output = self.unet, conditioning.pooled_prompt_embeds, None
        config, dtype = unet.config, unet.conv_in.weight.dtype
        sample = beside_sources(unet, latents, conditioning, self.latent_space).to(dtype)
        tokens = conditioning.prompt_embeds.to(dtype)
        projected = config.encoder_hid_dim_type == "text_proj"  # by the U-Net, such as Kolors'
        width = config.encoder_hid_dim if projected else config.cross_attention_dim
        if isinstance(width, int) and tokens.shape[-1] != width:
            raise InputError(
                f"prompt_embeds are {tokens.shape[-1]} wide, but the U-Net takes {width}; give the text encoder of its "
                "pipeline"
            )
        added = {}
        if config.addition_embed_type == "text_time":
            height, breadth = (float(side) for side in self.native_size)
            # SDXL's size conditioning as in training of LRM-SDXL: original size native, no crop, target size native.
            sizes = [height, breadth, 0.0, 0.0, height, breadth]
            added = {"text_embeds": pooled.to(dtype), "time_ids": sample.new_tensor(sizes).expand(len(sample), 6)}
        names = "conv_in", "time_embedding", *(["add_embedding"] if added else []), *(["encoder_hid_proj"] * projected)
        watched = {name: getattr(unet, name) for name in names} | dict(enumerate(self.blocks(), start=1))
        lists, last = {}, self.visual_taps[-1]
        if not self.output_map:
            name, kept = ("up_blocks", ()) if last == self._mid else ("down_blocks", unet.down_blocks[:last])
            lists[name] = FirstBlocks(kept, len(kept), ends=True)
        with recorded(unet, lists, watched) as seen:
            output = unet(sample, timesteps, tokens, added_cond_kwargs=added).sample
        seen[0] = seen["conv_in"]
        for number, block in enumerate(unet.down_blocks, start=1):
            if number in seen:
                seen[number] = seen[number][1][len(block.resnets) - 1]
        maps = [seen[tap] for tap in self.visual_taps]
        return Features(
            visual=tuple(features.flatten(2).transpose(1, 2) for features in maps),
            visual_grids=tuple(tuple(features.shape[2:]) for features in maps),
            text=(seen["encoder_hid_proj"] if projected else tokens,) * len(self.text_taps),
            pooled_text=pooled,
            temb=seen["time_embedding"] + seen["add_embedding"] if added else seen["time_embedding"],
            output=output,
        )

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.unet.down_blocks
        if self.unet.mid_block is not None:
            yield self.unet.mid_block
        yield from self.unet.up_blocks


def beside_sources(unet: Any, latents: Tensor, conditioning: Conditioning, space: LatentSpace) -> Tensor:
    """Join noisy latents ``(B, C, h, w)`` and those of the pictures that the U-Net edits, on the channel axis.

    InstructPix2Pix takes the posterior's mode without the scaling of other latents (arXiv:2211.09800, released code).
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
