"""Twin of HiDream-I1-Full, with the scheduler of the published pipeline."""

import math
from typing import Any

from diffusers import DiffusionPipeline, HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

from tests.diffusion.families.flux_vae import flux_vae
from tests.diffusion.families.twin_ernie_image import mistral_tokenizer
from tests.diffusion.families.twin_wan21 import WanTwin
from tests.tiny_pipelines import WIDTH, clip_config, clip_tokenizer, t5_tokenizer

SIZE = (32, 48)
LAYERS = (1, 0, 2, 2)
"""Layers of Llama that the blocks read: as in the published model the last one more than once."""


def clip(width: int) -> CLIPTextModelWithProjection:
    config = clip_config(clip_tokenizer(), width)
    config.max_position_embeddings = 128
    return CLIPTextModelWithProjection(config)


def transformer(**options: Any) -> HiDreamImageTransformer2DModel:
    return HiDreamImageTransformer2DModel(
        **{
            "patch_size": 2, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 12,
            "num_attention_heads": 2, "caption_channels": [24, WIDTH], "text_emb_dim": 2 * WIDTH,
            "axes_dims_rope": (4, 4, 4), "max_resolution": (4, 6), "llama_layers": [*LAYERS], **options,
        }
    )  # fmt: skip


def pipeline(**options: Any) -> DiffusionPipeline:
    words, t5_words = mistral_tokenizer(), t5_tokenizer()
    t5 = T5Config(vocab_size=len(t5_words), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    llama = LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager",
    )  # fmt: skip
    return HiDreamImagePipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=flux_vae(), text_encoder=clip(WIDTH), tokenizer=clip_tokenizer(), text_encoder_2=clip(2 * WIDTH),
        tokenizer_2=clip_tokenizer(), text_encoder_3=T5EncoderModel(t5), tokenizer_3=t5_words,
        text_encoder_4=LlamaForCausalLM(llama), tokenizer_4=words, transformer=transformer(**options),
    )  # fmt: skip


def of_this_area(pipeline: Any) -> None:
    """Let the pipeline, which scales all sizes to one area, keep :data:`SIZE`."""
    pipeline.default_sample_size = 1.000001 * math.sqrt(math.prod(SIZE)) / pipeline.vae_scale_factor


TWINS = [WanTwin("hidream", "hidream", pipeline, SIZE, backbone="hidream", mended=of_this_area)]
