"""Twins of Krea 2 Raw and Turbo."""

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)

from tests.diffusion.families.made_qwen_image import tokenizer
from tests.diffusion.families.made_wan21 import vae
from tests.diffusion.families.qwen3_vl import text_encoder
from tests.diffusion.families.twin_qwen_image import packed, unpacked
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH

LAYERS = (1, 3)


def pipeline(distilled: bool) -> DiffusionPipeline:
    words = tokenizer()
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=vae(AutoencoderKLQwenImage),
        text_encoder=text_encoder(len(words), 4),  # one layer more than is read
        tokenizer=words,
        transformer=Krea2Transformer2DModel(
            num_layers=4,
            attention_head_dim=12,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=WIDTH,
            num_text_layers=len(LAYERS),
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 4),
        ),
        text_encoder_select_layers=LAYERS,
        is_distilled=distilled,
    )


COMMON: dict[str, Any] = {"family": "krea2", "given": packed, "found": unpacked, "backbone": "krea2"}
TWINS = [
    Twin("krea2", build=lambda: pipeline(distilled=False), **COMMON),
    Twin(
        "krea2_turbo", build=lambda: pipeline(distilled=True), call={"guidance_scale": 0.0}, same_network=True, **COMMON
    ),
]
