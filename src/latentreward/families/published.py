"""Configs of published pipelines, copied from the hub, and parts that several of them share.

Only fields that set shapes, levels or constants are kept; diffusers and transformers fill in defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """Configs of a pipeline on the hub.

    Attributes:
        model: Hub id.
        parts: Part of the pipeline → content of the part's config.
        index: Entries of ``model_index.json`` besides the parts.
        short: Short name; by default the last part of the hub id in lower case.
    """

    model: str
    parts: Mapping[str, Mapping[str, Any]]
    index: Mapping[str, Any] = field(default_factory=dict)
    short: str = ""

    @property
    def key(self) -> str:
        """Name of the pipeline's folder in an estimate."""
        return self.short or self.model.rpartition("/")[2].lower()


T5_XXL: Mapping[str, Any] = {
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
UMT5_XXL: Mapping[str, Any] = {**T5_XXL, "model_type": "umt5", "vocab_size": 256384}
CLIP_L: Mapping[str, Any] = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
CLIP_G: Mapping[str, Any] = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
CLIP_H: Mapping[str, Any] = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
QWEN3_4B: Mapping[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN3_8B: Mapping[str, Any] = {
    **QWEN3_4B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
QWEN25_VL_7B: Mapping[str, Any] = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {"model_type": "qwen2_5_vl_vision", "hidden_size": 1280, "out_hidden_size": 3584},
}
GEMMA2_2B: Mapping[str, Any] = {"model_type": "gemma2", "vocab_size": 256000}  # other sizes are the class's defaults
SD_VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
FLUX_VAE: Mapping[str, Any] = {
    **SD_VAE,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
WAN_VAE: Mapping[str, Any] = {
    "z_dim": 16,
    "base_dim": 96,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "temperal_downsample": (False, True, True),
    "latents_mean": (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    "latents_std": (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
    ),
}  # fmt: skip
