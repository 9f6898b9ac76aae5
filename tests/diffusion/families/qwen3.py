"""Qwen3, the text encoder of Z-Image and FLUX.2-klein, in small."""

from typing import Any

from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.tiny_pipelines import WIDTH

TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
"""Chat template that gives for a user's message what Qwen3's gives."""


def qwen_tokenizer(**options: str) -> Qwen2Tokenizer:
    """A byte-level tokenizer with one merge."""
    symbols = [*bytes_to_unicode().values(), "ca"]
    vocab = {symbol: number for number, symbol in enumerate(symbols)} | {"<|endoftext|>": len(symbols)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[("c", "a")], **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen_config(tokenizer: Qwen2Tokenizer, **options: Any) -> Qwen3Config:
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    return Qwen3Config(**{**settings, **options})


def qwen(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    return Qwen3Model(qwen_config(tokenizer))
