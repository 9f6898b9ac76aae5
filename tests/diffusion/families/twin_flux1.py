"""Twins of FLUX.1-dev, FLUX.1-schnell, and FLUX.1-Kontext, which without a picture to edit makes pictures from text."""

from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tests.diffusion.families.flux_vae import flux_vae
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH, clip_config, clip_tokenizer, t5_tokenizer

CHANNELS = 16
DOWNSCALE = 8
"""Pixels per latent of the VAE."""


def flux1(dev: bool) -> DiffusionPipeline:
    tokenizer, words = clip_tokenizer(), t5_tokenizer()
    t5 = T5Config(vocab_size=len(words), d_model=3 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    shift = (
        {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15} if dev else {"shift": 1.0}
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift, base_image_seq_len=256, max_image_seq_len=4096),
        vae=flux_vae(), text_encoder=CLIPTextModel(clip_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5), tokenizer_2=words,
        transformer=FluxTransformer2DModel(
            in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=12, num_attention_heads=2,
            joint_attention_dim=3 * WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=dev, axes_dims_rope=(4, 4, 4),
        ),
    )  # fmt: skip


def packed(latents: Tensor, size: tuple[int, int]) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpacked(latents: Tensor, size: tuple[int, int]) -> Tensor:
    return FluxPipeline._unpack_latents(latents, *size, DOWNSCALE)


def kontext() -> DiffusionPipeline:
    return FluxKontextPipeline(**{**flux1(dev=True).components, "image_encoder": None, "feature_extractor": None})


PACKED: dict[str, Any] = {"given": packed, "found": unpacked}
TWINS = [
    Twin("flux1_dev", "flux1", lambda: flux1(dev=True), call={"guidance_scale": 3.5}, backbone="flux1", **PACKED),
    Twin("flux1_schnell", "flux1", lambda: flux1(dev=False), call={"guidance_scale": 0.0, "max_sequence_length": 256},
         backbone="flux1", **PACKED),
    Twin("flux1_kontext", "flux1_kontext", kontext, backbone="flux1_kontext",
         call={"guidance_scale": 2.5, "max_area": 32 * 48}, **PACKED),  # else the size is changed to an area of 1024²
]  # fmt: skip
