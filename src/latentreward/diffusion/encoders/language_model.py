"""Prompt encoder with a causal language model, for families that read its second-to-last hidden states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from latentreward.core.contracts import Conditioning
from latentreward.diffusion.encoders.prompts import PromptEncoder


class LanguageModelEncoder(PromptEncoder):
    """Prompt encoder whose token embeddings are the output of a causal language model without its last layer.

    Prompts are tokenised without padding and padded on the right to the longest of the batch, whatever the side of the
    tokenizer: attention is causal and positions are relative, so padding changes no token of a prompt.

    Args:
        text_encoder: Base model of transformers, as :func:`without_last_layer` returns it.
        tokenizer: Tokenizer of the model.
        num_tokens: Greatest number of tokens of a prompt; longer ones are truncated.
    """

    masked = True
    pooled_dim = 0

    def __init__(self, text_encoder: Any, tokenizer: Any, num_tokens: int) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.num_tokens, self.token_dim = num_tokens, text_encoder.config.hidden_size

    @abstractmethod
    def text(self, prompt: str) -> str:
        """Return the text that is tokenised for ``prompt``."""

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """See :meth:`PromptEncoder.tokenize`; −1 follows the ids of shorter prompts."""
        return (self.token_ids([self.text(prompt) for prompt in prompts]),)

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids ``(B, length)`` of whole texts, padded with −1 to the longest."""
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.num_tokens).input_ids
        self.tell_cut(self.tokenizer, texts, [len(row) for row in rows], self.num_tokens)
        with torch.device("cpu"):  # the empty text has no token if the tokenizer puts none before a text
            return pad_sequence([torch.tensor(row or [0]) for row in rows], batch_first=True, padding_value=-1)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        counts: list[int] = (self.tokenize(prompts)[0] >= 0).sum(dim=1).tolist()
        return counts

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        (ids,) = input_ids
        mask = ids >= 0
        output = self.text_encoder(input_ids=ids.clamp(min=0), attention_mask=mask, use_cache=False)
        return Conditioning(output.last_hidden_state, prompt_mask=mask)


def first_layers(model: Any, count: int) -> Any:
    """Remove the layers of a base model after the first ``count``, in place, and the final norm with them.

    The norm stays in a model without further layers, as its last hidden states come after it.
    """
    if len(model.layers) > count:
        model.layers, model.norm = model.layers[:count], nn.Identity()
    return model


def without_last_layer(model: Any) -> Any:
    """Remove the last layer and the final norm of a base model, in place, so that it returns ``hidden_states[-2]``."""
    model.layers = model.layers[:-1]
    model.norm = nn.Identity()
    return model
