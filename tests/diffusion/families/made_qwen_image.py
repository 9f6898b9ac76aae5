"""Tiny parts of Qwen-Image."""

import re
from collections.abc import Sequence
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from latentreward.diffusion.families.qwen_image import TEMPLATE
from tests.diffusion.families.made_wan21 import vae

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer(
    words: bool = True, template: str = TEMPLATE, special: Sequence[str] = (), **options: Any
) -> Qwen2Tokenizer:
    """Bytes, and with ``words`` a token for each word of the template, as Qwen's own tokenizer has."""
    vocab, merges = [*bytes_to_unicode().values()], []
    found = sorted(re.findall(r"'s| ?[A-Za-z]+| \(|\),", template), key=lambda word: not word.startswith(" "))
    for word in dict.fromkeys(found) if words else ():
        symbols = word.replace(" ", "Ġ")
        if symbols in ("im", "start", "end"):  # parts of the special tokens
            continue
        for end in range(1, len(symbols)):
            if (pair := (symbols[:end], symbols[end])) not in merges:
                merges.append(pair)
                vocab.append("".join(pair))
    numbers = {token: number for number, token in enumerate(dict.fromkeys([*vocab, *SPECIAL, *special]))}
    return Qwen2Tokenizer(vocab=numbers, merges=merges, extra_special_tokens=[*SPECIAL[1:], *special], **options)


def text_encoder(rows: int) -> Qwen2_5_VLForConditionalGeneration:
    """A language model of two layers, and a vision tower that must never be read."""
    text = {
        "vocab_size": rows, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128000,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}, "rope_theta": 1000000.0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def transformer(**options: Any) -> QwenImageTransformer2DModel:
    settings: dict[str, Any] = {
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    return QwenImageTransformer2DModel(**{**settings, **options})


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The settings of the published scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip


def qwen_image(**options: Any) -> DiffusionPipeline:
    words = tokenizer(**options)
    return QwenImagePipeline(
        scheduler=scheduler(),
        vae=vae(AutoencoderKLQwenImage),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=transformer(),
    )
