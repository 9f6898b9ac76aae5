"""CLIP tokenizer with one token for each word of the tiny world, and byte tokens for all other text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from latentreward.tinyworld.captions import all_captions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer

MAX_TOKENS = 16
"""Number of tokens per caption, including start, end and padding."""


@cache
def build_tokenizer(words: tuple[str, ...] | None = None) -> CLIPTokenizer:
    """Build the tokenizer of all tiny text encoders; it accepts any string, and captions have at most 14 tokens.

    ``words`` have one token each; those of all captions if None.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = words or tuple(sorted({word for text in all_captions() for word in text.split()}))
    merges: list[tuple[str, str]] = []  # byte-pair merges, in rank order, that make each word one token
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for merge in merges:
            pieces = _apply(merge, pieces)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply(merges[-1], pieces)
    symbols = list(bytes_to_unicode().values())
    vocab = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(a + b for a, b in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(captions: Sequence[str], words: tuple[str, ...] | None = None) -> Tensor:
    """Tokenise N captions to token IDs ``(N, 16)``; see :func:`build_tokenizer`."""
    return build_tokenizer(words)(list(captions), padding="max_length", return_tensors="pt").input_ids


def _apply(merge: tuple[str, str], pieces: list[str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == merge:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
