"""Tiny parts of Wan 2.1."""

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny_pipelines import t5_tokenizer

WIDTH = 32


def unipc(**options: Any) -> UniPCMultistepScheduler:
    """The scheduler of the published pipelines."""
    return UniPCMultistepScheduler(
        **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **options}
    )


def vae(kind: type = AutoencoderKLWan, **options: Any) -> Any:
    """Latents have 16 channels and the published means and standard deviations."""
    return kind(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **options)


def transformer(**options: Any) -> WanTransformer3DModel:
    settings: Mapping[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": WIDTH // 2, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48,
        "num_layers": 4, "rope_max_seq_len": 64,
    }  # fmt: skip
    return WanTransformer3DModel(**{**settings, **options})


def text_encoder(rows: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=rows, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def wan21(scheduler: Any = None, **index: Any) -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder(len(tokenizer)), vae=vae(), scheduler=scheduler or unipc(),
        transformer=transformer(), **index,
    )  # fmt: skip
