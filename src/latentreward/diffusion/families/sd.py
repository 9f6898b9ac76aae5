"""Stable Diffusion 1.5, 2.1 and XL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, LatentSpace, PathText, TapSpec
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.diffusion.backbones.base import DiffusionBackbone, FirstBlocks, check_taps, recorded
from latentreward.diffusion.backbones.loading import check_channels, check_sample_size, tiny_pipeline
from latentreward.diffusion.backbones.tuning import Tuning, freeze
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.families.backbone import BackboneOptions
from latentreward.diffusion.families.base import Family, Pair, PipelineConfigs
from latentreward.diffusion.noise.processes import NoiseProcess, process_from_scheduler
from latentreward.diffusion.noise.schedules import DDPM_SCHEDULERS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

EDITORS = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")
"""Classes of InstructPix2Pix's pipelines, whose U-Nets differ by the channels of the picture to edit."""


class StableDiffusion(Family):
    """Family of SD1.5, SD2.1 and SDXL: a U-Net that predicts noise or v, one or two CLIP text encoders."""

    name = "sd"
    title = "Stable Diffusion (SD1.5, SD2.1, SDXL)"
    part = "unet"
    network_class = "UNet2DConditionModel"
    flow = False
    default_guidance = 5.0  # LPO's, instead of the pipelines' 7.5

    @classmethod
    def recognises(cls, pipeline: PipelineConfigs) -> bool:
        """See :meth:`Family.recognises`; InstructPix2Pix has the same kind of network, and other pipelines."""
        return pipeline.has("unet") and (pipeline.index.get("_class_name") in EDITORS) == bool(cls.sources[1])

    def check(self) -> None:
        if self.config.get("time_cond_proj_dim") is not None:  # else diffusers would leave the guidance scale out
            told = "takes the guidance scale as an input (LCM); give the model that it was distilled from"
            raise InputError(f"source={self.pipeline.source!r}: the U-Net has time_cond_proj_dim: it {told}")
        check_channels(self.pipeline.source, "unet", self.config, self.latent_space, 1 + self.sources[0])

    @property
    def model(self) -> str:
        return unet_family(self.config)

    @property
    def is_xl(self) -> bool:
        """Whether the U-Net takes pooled text and sizes, as SDXL's."""
        return self.config.get("addition_embed_type") == "text_time"

    @property
    def native_size(self) -> tuple[int, int]:
        height, width = check_sample_size(self.config.get("sample_size"))
        return height * self.latent_space.downscale, width * self.latent_space.downscale

    def load_prompt_encoder(
        self, t5_length: int | None = None, load_t5: bool = True, pretrained: bool = True
    ) -> PromptEncoder:
        two = self.pipeline.has("text_encoder_2")
        encoder: PromptEncoder = (self.pipeline.sdxl_prompts if two else self.pipeline.clip_prompts)(pretrained, True)
        return encoder

    def encode_uncond(self, encoder: PromptEncoder) -> Conditioning:
        """See :meth:`Family.encode_uncond`; zeros where the pipeline has ``force_zeros_for_empty_prompt`` (SDXL)."""
        encoded = super().encode_uncond(encoder)
        forced = self.pipeline.index.get("force_zeros_for_empty_prompt", self.is_xl)  # diffusers' defaults
        return encoded.zeros() if forced else encoded

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """See :attr:`Family.scheduler_config`; two entries are what ``StableDiffusionPipeline`` sets them to."""
        others = self.is_xl or self.sources[1]  # whose pipelines take the scheduler as it is
        return super().scheduler_config | ({} if others else {"steps_offset": 1, "clip_sample": False})

    @cached_property
    def noise_process(self) -> NoiseProcess:
        return process_from_scheduler(self.scheduler_config, DDPM_SCHEDULERS)

    def predict(
        self, network: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        if conditioning.source_latents or network.config.in_channels > latents.shape[1]:  # InstructPix2Pix
            latents = beside_sources(network, latents, conditioning, self.latent_space)
        dtype, downscale = network.conv_in.weight.dtype, self.latent_space.downscale
        sides = [float(side * downscale) for side in latents.shape[-2:]]
        added = added_conditions(conditioning.pooled_prompt_embeds, sides, latents.to(dtype)) if self.is_xl else None
        text, at = conditioning.prompt_embeds.to(dtype), timesteps.to(latents.device)
        output: Tensor = network(latents.to(dtype), at, text, added_cond_kwargs=added).sample
        return output

    def blocks(self, network: Any) -> Iterator[nn.Module]:
        yield from network.down_blocks
        yield network.mid_block
        yield from network.up_blocks

    @property
    def lora_loader(self) -> str:
        return f"StableDiffusion{'XL' if self.is_xl else ''}LoraLoaderMixin"

    def kohya_layers(self, layers: Mapping[str, Pair]) -> dict[str, Pair]:
        return dict(layers)


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
        if config.addition_embed_type == "text_time":  # sizes as in training of LRM-SDXL: native ones, no crop
            added = added_conditions(pooled, [float(side) for side in self.native_size], sample)
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


def added_conditions(pooled: Tensor | None, sides: Sequence[float], like: Tensor) -> dict[str, Tensor]:
    """Return SDXL's pooled text and sizes: original (height, width), no crop, and the same as target."""
    assert pooled is not None
    sizes = like.new_tensor([*sides, 0.0, 0.0, *sides])
    return {"text_embeds": pooled.to(like.dtype), "time_ids": sizes.expand(len(like), 6)}


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


def unet_family(config: dict[str, Any]) -> str:
    """Return the model family of a U-Net config: ``SDXL``, ``SD2.1`` or ``SD1.5``."""
    if config.get("addition_embed_type") == "text_time":
        return "SDXL"
    return "SD2.1" if config.get("cross_attention_dim") == 1024 else "SD1.5"


@dataclass(frozen=True)
class UNetOptions(BackboneOptions):
    """Options of the factories of U-Nets, which by default train all weights, as LRM does.

    Attributes:
        tuning: Weights of the U-Net that train: ``full`` (all), ``lora`` (adapters) or ``frozen`` (none).
        text_encoder_tuning: Weights of the text encoder that train: ``full``, ``lora`` or ``frozen``.
    """

    tuning: Tuning = "full"
    text_encoder_tuning: Tuning = "full"


def load_sd(
    source: str,
    model: str | None = None,
    name: str = "sd",
    visual_taps: Sequence[int] | None = None,
    text_taps: Sequence[int] = (0,),
    output_map: bool = False,
    **options: Any,
) -> SDUNetBackbone:
    """Load a backbone from the U-Net of a Stable Diffusion pipeline.

    Args:
        source: Diffusers pipeline folder, or hub id.
        model: ``SD1.5``, ``SD2.1`` or ``SDXL``, which the pipeline must be; None takes all.
        name: Name of the family that the pipeline must belong to.
        visual_taps: Numbers of the blocks to read; None reads all down blocks and the mid block.
        text_taps: ``[0]`` reads the prompt embeddings; ``[]`` reads no text.
        output_map: Whether to run the whole U-Net and return its output too, for a head that reads it.
        options: See :class:`UNetOptions` and :class:`~latentreward.diffusion.families.backbone.BackboneOptions`.
    """
    chosen = UNetOptions(**options)
    family = chosen.family(source, name, model)
    network, encoders = chosen.parts(family, pretrained=chosen.pretrained)
    space, taps = (family.noise_process, family.latent_space), (visual_taps, text_taps)
    backbone = SDUNetBackbone(network, *space, *taps, output_map=output_map, **encoders)
    backbone.sources, backbone.source_encoder = family.sources, family.source_encoder(encoders["vae"])
    return chosen.finish(backbone, family)


@register_backbone
def sd15(source: PathText, **options: Any) -> SDUNetBackbone:
    """Load Stable Diffusion 1.5 (CreativeML OpenRAIL-M), the backbone of LRM-SD1.5."""
    return load_sd(source, "SD1.5", **options)


@register_backbone
def sd21(source: PathText, **options: Any) -> SDUNetBackbone:
    """Load Stable Diffusion 2.1 (CreativeML OpenRAIL++-M) with its OpenCLIP-H text encoder; v- or ε-prediction.

    Note:
        LPO's published SD2.1 runs use the reward trained on SD1.5, which has the same VAE; this factory is for a reward
        trained on SD2.1 itself.
    """
    return load_sd(source, "SD2.1", **options)


@register_backbone
def sdxl(source: PathText, **options: Any) -> SDUNetBackbone:
    """Load Stable Diffusion XL base (CreativeML OpenRAIL++-M), the backbone of LRM-SDXL."""
    return load_sd(source, "SDXL", **options)


@register_backbone
def sd_tiny(source: PathText | None = None, **options: Any) -> SDUNetBackbone:
    """Load the tiny Stable Diffusion that is shipped with the package for tests and tutorials."""
    return load_sd(source or tiny_pipeline("sd_tiny"), **options)
