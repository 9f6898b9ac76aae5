"""Prompts that were encoded before, in place of the text encoders that encoded them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError
from latentreward.diffusion.encoders.prompts import PromptEncoder


class StoredPrompts(PromptEncoder):
    """Prompt encoder that looks prompts up in a table; it has no weights.

    Args:
        encoder: Encoder that encoded the prompts.
        prompts: Distinct prompts, in the order of the rows of ``table``.
        table: Encoded prompts on the CPU, which may be mapped from files; None without prompts.
        device: Device that results are moved to.
        remedy: What a user can do about a prompt that is not in the table.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        prompts: Sequence[str],
        table: Conditioning | None,
        device: torch.device,
        remedy: str = "give it to data.prompts or to a callback's prompts",
    ) -> None:
        super().__init__()
        self.num_tokens, self.token_dim, self.pooled_dim = encoder.num_tokens, encoder.token_dim, encoder.pooled_dim
        self.masked, self.sees_sources = encoder.masked, encoder.sees_sources
        self.clip_length = getattr(encoder, "clip_length", None)  # of SD3's encoder, whose T5 tokens come after CLIP's
        self._remedy = remedy
        self._rows, self._table, self._device = {prompt: row for row, prompt in enumerate(prompts)}, table, device

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the rows of ``prompts`` in the table, ``(B,)`` int64; raises InputError if one is not there."""
        for prompt in prompts:
            if prompt not in self._rows:
                raise InputError(
                    f"the prompt {prompt!r} was not encoded before the first step, and EncodeOnce has freed the text "
                    f"encoders; {self._remedy}, or leave EncodeOnce out"
                )
        return (torch.tensor([self._rows[prompt] for prompt in prompts], dtype=torch.int64),)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        """Return the rows ``input_ids[0]`` of the table, on the device."""
        assert self._table is not None
        return self._table.select(input_ids[0]).trimmed().to(self._device)

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Look ``prompts`` up."""
        return self.encode_ids(*self.tokenize(prompts))
