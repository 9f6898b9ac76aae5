"""Prompt encoders in place of others: a table of encoded prompts, and encoders that lie in CPU memory meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError
from latentreward.diffusion.encoders.prompts import PromptEncoder


class StandIn(PromptEncoder):
    """Prompt encoder in the place of ``encoder``, with the same sizes."""

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__()
        self.num_tokens, self.token_dim, self.pooled_dim = encoder.num_tokens, encoder.token_dim, encoder.pooled_dim
        self.masked, self.sees_sources = encoder.masked, encoder.sees_sources
        self.clip_length = getattr(encoder, "clip_length", None)  # of SD3's encoder, whose T5 tokens come after CLIP's


class StoredPrompts(StandIn):
    """Prompt encoder that looks prompts up in a table; it has no weights.

    Args:
        encoder: Encoder that encoded the prompts.
        prompts: Distinct prompts, in the order of the rows of ``table``.
        table: Encoded prompts on the CPU, which may be mapped from files; None without prompts.
        device: Device that results are moved to.
        remedy: What to do about a prompt that is not in the table.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        prompts: Sequence[str],
        table: Conditioning | None,
        device: torch.device,
        remedy: str = "give it to data.prompts or to a callback's prompts",
    ) -> None:
        super().__init__(encoder)
        self._remedy = remedy
        self._rows, self._table, self._device = {prompt: row for row, prompt in enumerate(prompts)}, table, device

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the rows ``(B,)`` of ``prompts`` in the table."""
        for prompt in prompts:
            if prompt not in self._rows:
                raise InputError(
                    f"the prompt {prompt!r} was not encoded before the first step, and EncodeOnce has freed the text "
                    f"encoders; {self._remedy}, or leave EncodeOnce out"
                )
        return (torch.tensor([self._rows[prompt] for prompt in prompts], dtype=torch.int64),)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        assert self._table is not None
        return self._table.select(input_ids[0]).trimmed().to(self._device)

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode_ids(*self.tokenize(prompts))


AHEAD = 256  # number of prompts that are encoded at once: SD3.5's take 1.4 GB of CPU memory, FLUX.2-klein's 4 GB


class OffloadedEncoder(StandIn):
    """Prompt encoder that leaves the accelerator between groups of prompts.

    A prompt that is not encoded yet brings the encoder to the accelerator for this prompt and the next ones of the
    list. Prompts are encoded one by one and kept on the CPU; those of earlier groups are forgotten.

    Args:
        encoder: Encoder, which is moved to the CPU.
        prompts: Prompts of the run, in order.
        device: Device on which prompts are encoded, and that results are moved to.
        ahead: Number of prompts in a group.
    """

    def __init__(
        self, encoder: PromptEncoder, prompts: Sequence[str], device: torch.device, ahead: int = AHEAD
    ) -> None:
        super().__init__(encoder)
        self._encoder = (encoder.to("cpu"),)  # in a tuple, so that moves of the policy leave it on the CPU
        self._order = [*dict.fromkeys(prompts)]
        self._places = {prompt: place for place, prompt in enumerate(self._order)}
        self._device, self._ahead = device, ahead
        self._rows: dict[str, Conditioning] = {}

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return self._encoder[0].tokenize(prompts)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self._encoder[0].count_tokens(prompts)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        encoder = self._encoder[0].to(self._device)
        try:
            return encoder.encode_ids(*(ids.to(self._device) for ids in input_ids))
        finally:
            encoder.to("cpu")

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Look ``prompts`` up, and encode those that are missing, with the ones that follow them."""
        if missing := [prompt for prompt in prompts if prompt not in self._rows]:
            self._encode(missing, prompts)
        return Conditioning.join([self._rows[prompt] for prompt in prompts]).to(self._device)

    @torch.no_grad()
    def _encode(self, missing: Sequence[str], asked: Sequence[str]) -> None:
        places = [self._places[prompt] for prompt in missing if prompt in self._places]
        group = self._order[min(places) : min(places) + self._ahead] if places else []
        wanted, kept = dict.fromkeys([*missing, *group]), self._rows
        if group:  # prompts outside the list, such as the empty one of guidance, come again with each batch
            kept = {prompt: row for prompt, row in kept.items() if prompt in asked or prompt not in self._places}
        encoder = self._encoder[0].to(self._device)
        try:
            new = {prompt: encoder([prompt]).to("cpu") for prompt in wanted if prompt not in kept}
        finally:
            encoder.to("cpu")
        self._rows = kept | new
