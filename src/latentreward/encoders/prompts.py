"""What every prompt encoder promises."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentreward.contracts import Conditioning
from latentreward.errors import InputError


class PromptEncoder(nn.Module, ABC):
    """Words → token embeddings and a pooled vector, the way one diffusion network wants them.

    Tokenising and encoding are two steps, so that token ids can be kept, or come from elsewhere.

    Attributes:
        num_tokens: Token embeddings per prompt.
        token_dim: Width of a token embedding.
        pooled_dim: Width of the pooled vector.
        unread: Names of submodules whose output nobody uses; training them would leave DDP waiting for gradients.
        tokens_only: Names of submodules that only the token embeddings need, not the pooled vector.
    """

    num_tokens: int
    token_dim: int
    pooled_dim: int
    unread: tuple[str, ...] = ()
    tokens_only: tuple[str, ...] = ()

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids, one ``(B, length)`` per text encoder, on the CPU; longer prompts are cut."""

    @abstractmethod
    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        """Embeddings of what :meth:`tokenize` gives."""

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of ``prompts``; without a graph where no parameter trains."""
        device = next(self.parameters()).device
        ids = [tensor.to(device) for tensor in self.tokenize(prompts)]
        trains = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self.encode_ids(*ids)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Ids ``(B, length)`` int64 on the CPU, padded and cut to ``length``.

    Raises:
        InputError: If there is no tokenizer.
    """
    if tokenizer is None:
        raise InputError("prompts were given as text, but there is no tokenizer; load it with its base pipeline")
    with torch.device("cpu"):
        return tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
