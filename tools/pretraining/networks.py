"""Construction of the two tiny pipelines with untrained networks, and saving of pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from latentreward.storage.durable import replacing
from latentreward.tinyworld.tokenizer import MAX_TOKENS, build_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
    from transformers import CLIPTextConfig

WIDTH = 64
"""Hidden size of the text encoders."""


def build_sd(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """Build a tiny Stable Diffusion 1.5: a U-Net of four levels, three with cross-attention, and one CLIP text encoder.

    The trained ``vae`` has 8x8 latents of 4 channels.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 48, 64, 64),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, despite its name
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config()).eval(),
        tokenizer=build_tokenizer(),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sd35(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Build a tiny Stable Diffusion 3.5 Medium: four joint blocks, dual attention in the first two, no T5.

    The trained ``vae`` has 8x8 latents of 4 channels.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=vae,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(text_config()).eval(),
        tokenizer=build_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config()).eval(),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def text_config(intermediate_size: int = 2 * WIDTH) -> CLIPTextConfig:
    """Return the config of a CLIP text encoder with two layers and the tiny world's vocabulary."""
    from transformers import CLIPTextConfig

    tokenizer = build_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=intermediate_size,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_pipeline(pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline, folder: Path) -> None:
    """Save a pipeline in little space: text encoders in float32, autoencoder and denoiser in float16.

    transformers loads a model in the dtype it was saved in, and diffusers loads models in float32, so that a plain
    ``from_pretrained`` gives float32 throughout. Local paths that components were loaded from are removed from the
    configs. The folder is written atomically, and replaced if it exists. Autoencoder and denoiser of the float32
    ``pipeline`` are rounded to float16 in place and kept as float32.
    """
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    for model in (pipeline.vae, denoiser):
        model.to(torch.float16)
    with replacing(folder) as fresh:
        pipeline.save_pretrained(fresh)
        for path in (fresh / "model_index.json", *fresh.glob("*/*config.json")):
            config = json.loads(path.read_text())
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for model in (pipeline.vae, denoiser):
        model.to(torch.float32)
