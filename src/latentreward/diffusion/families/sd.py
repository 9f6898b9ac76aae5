"""Stable Diffusion 1.5, 2.1 and XL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.diffusion.backbones.loading import SHIPPED, check_channels, check_sample_size, tiny_pipeline
from latentreward.diffusion.backbones.sd_unet import SDUNetBackbone, beside_sources, check_undistilled, unet_family
from latentreward.diffusion.backbones.tuning import Tuning
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.families.backbone import BackboneOptions
from latentreward.diffusion.families.base import Family, Pair, PipelineConfigs
from latentreward.diffusion.noise.processes import NoiseProcess, process_from_scheduler
from latentreward.diffusion.noise.schedules import DDPM_SCHEDULERS

EDITORS = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")
"""Classes of InstructPix2Pix's pipelines, whose U-Nets differ by the channels of the picture to edit."""


class StableDiffusion(Family):
    """Family of SD1.5, SD2.1 and SDXL: a U-Net that predicts noise or v, one or two CLIP text encoders."""

    name = "sd"
    title = "Stable Diffusion (SD1.5, SD2.1, SDXL)"
    part = "unet"
    network_class = "UNet2DConditionModel"
    block_classes = ("CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn")
    refused: ClassVar[Mapping[str, str]] = {
        "KolorsPipeline": "its text encoder is a ChatGLM; give a pipeline of SD1.5, SD2.1 or SDXL with CLIP",
    }
    text_layers = ("CLIPEncoderLayer",)
    flow = False
    plain_states = True
    default_guidance = 5.0  # LPO's, instead of the pipelines' 7.5

    @classmethod
    def recognises(cls, pipeline: PipelineConfigs) -> bool:
        """See :meth:`Family.recognises`; InstructPix2Pix has the same kind of network, and other pipelines."""
        return pipeline.has("unet") and (pipeline.index.get("_class_name") in EDITORS) == bool(cls.sources[1])

    def check(self) -> None:
        found = self.config.get("_class_name", self.network_class)
        if found != self.network_class:
            raise InputError(
                f"source={self.pipeline.source!r} has a {found} as unet; this family needs a {self.network_class}, as "
                "SD1.5, SD2.1 and SDXL have it"
            )
        check_undistilled(self.pipeline.source, self.config)
        check_channels(self.pipeline.source, "unet", self.config, self.latent_space, 1 + self.sources[0])

    @property
    def model(self) -> str:
        return unet_family(self.config)

    @property
    def usual_reward(self) -> str:
        """See :attr:`Family.usual_reward`; LPO steers SD2.1 with the reward of SD1.5, which has the same VAE."""
        if self.pipeline.named in SHIPPED:
            return "lrm_tiny"
        return "lrm_sdxl" if self.is_xl else "lrm_sd15"

    @property
    def usual_reward_is_own(self) -> bool:
        return self.model != "SD2.1"

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
        has_unet = self.pipeline.has(self.part)  # a cache is written without one
        if has_unet and encoder.token_dim != (taken := self.config.get("cross_attention_dim", 1280)):
            raise InputError(
                f"source={self.pipeline.source!r}: the text encoder is {encoder.token_dim} wide, but the U-Net takes "
                f"{taken}; network and text encoder must come from one pipeline"
            )
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
        dtype = network.conv_in.weight.dtype
        extra = {}
        if self.is_xl:
            assert conditioning.pooled_prompt_embeds is not None
            height, width = (float(side * self.latent_space.downscale) for side in latents.shape[-2:])
            time_ids = torch.tensor([height, width, 0.0, 0.0, height, width], device=latents.device, dtype=dtype)
            extra["added_cond_kwargs"] = {
                "text_embeds": conditioning.pooled_prompt_embeds.to(dtype),
                "time_ids": time_ids.expand(len(latents), 6),
            }
        output: Tensor = network(
            latents.to(dtype), timesteps.to(latents.device), conditioning.prompt_embeds.to(dtype), **extra
        ).sample
        return output

    def blocks(self, network: Any) -> Iterator[nn.Module]:
        yield from network.down_blocks
        yield network.mid_block
        yield from network.up_blocks

    @property
    def lora_loader(self) -> str:
        return f"StableDiffusion{'XL' if self.is_xl else ''}LoraLoaderMixin"

    def kohya_layers(self, layers: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, list[Pair | None]]:
        """See :meth:`Family.kohya_layers`; kohya's scripts use diffusers' names of U-Nets."""
        return {layer: [pair] for layer, pair in layers.items()}


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
