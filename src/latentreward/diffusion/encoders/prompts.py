"""Base class of all prompt encoders."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, like_prompt, sources_of
from latentreward.core.errors import InputError
from latentreward.core.phases import phase
from latentreward.core.promises import VALUES, Part, keep_promise, returns, shown, wrong_tensor

logger = logging.getLogger(__name__)


def _wrong_ids(found: tuple[Tensor, ...], encoder: "PromptEncoder", prompts: Sequence[str]) -> str | None:
    if not isinstance(found, tuple) or not all(isinstance(ids, Tensor) and len(ids) == len(prompts) for ids in found):
        return f"{shown(found)}; it must be a tuple of tensors with {len(prompts)} rows"
    return None


class PromptEncoder(nn.Module, Part):
    """Encoder of prompts into token embeddings and a pooled vector, as one diffusion network takes them.

    Tokenising and encoding are separate methods, so that token ids can be stored or come from elsewhere.

    Attributes:
        num_tokens: Number of token embeddings per prompt.
        token_dim: Width of a token embedding.
        pooled_dim: Width of the pooled vector; 0 for families without one.
        masked: Whether encoded prompts have a mask of the tokens that the network attends to. Then ``num_tokens`` is
            their greatest number, they come first, and tokens after the longest prompt of a batch may be cut off.
            Padding that the network attends to counts: set it true in the mask, and let :meth:`count_tokens` count it.
            If the network attends to all padding, give no mask; then each prompt has ``num_tokens``.
        pools_tokens: Whether the pooled vector is the mean of the prompt's own tokens, which the network does not take.
        dropped_tokens: Number of tokens before the prompt's own whose embeddings a masked encoder drops.
        tokens_in_fingerprint: Whether the encoder's fingerprint covers the tokens of fixed prompts. Encoders of SD and
            SD3 have fingerprints without, because caches hold them.
        sees_sources: Whether the text encoder reads the pictures that prompts edit too, so that the empty prompt has an
            encoding for each picture.
        picture_settings: Settings of the reading of pictures on which the embeddings of prompts with pictures depend.
        unread: Names of submodules that no output depends on. They are frozen, because DDP fails on trainable
            parameters without a gradient.
        tokens_only: Names of submodules that the token embeddings depend on, but not the pooled vector.
    """

    needs = ("num_tokens", "token_dim", "pooled_dim")
    num_tokens: int
    token_dim: int
    pooled_dim: int
    masked: bool = False
    pools_tokens: bool = False
    dropped_tokens: int = 0
    tokens_in_fingerprint: bool = True
    sees_sources: bool = False
    picture_settings: Mapping[str, Any] = MappingProxyType({})
    unread: tuple[str, ...] = ()
    tokens_only: tuple[str, ...] = ()
    _told_cut: bool = False

    @abstractmethod
    @returns(_wrong_ids)
    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return token ids on the CPU, one tensor ``(B, length)`` per text encoder; longer prompts are truncated.

        A masked encoder returns the mask of the tokens ``(B, length)`` last, or has a :meth:`count_tokens` of its own.
        """

    @abstractmethod
    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        """Encode the token ids that :meth:`tokenize` returned, on the encoder's device."""

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of token embeddings of each prompt without encoding it."""
        if not self.masked:
            return [self.num_tokens] * len(prompts)
        counts: list[int] = (self.tokenize(prompts)[-1].sum(dim=1) - self.dropped_tokens).tolist()
        return counts

    def tell_cut(self, tokenizer: Any, texts: Sequence[str], counts: Sequence[int], limit: int) -> None:
        """Warn once if a text has more tokens than are read.

        Args:
            tokenizer: Tokenizer of the texts.
            texts: N texts as they are tokenised.
            counts: Number of tokens of each, at most ``limit`` where they were truncated.
            limit: Number of tokens that are read.
        """
        for text, count in zip(texts, counts, strict=True):
            if (
                not self._told_cut
                and count >= limit
                and (whole := len(tokenizer(text, verbose=False).input_ids)) > limit
            ):
                self._told_cut = True
                logger.warning("a prompt has %d tokens, of which %d are read (others are not reported)", whole, limit)

    @phase("encode")
    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Tokenise and encode ``prompts``; builds no autograd graph if no parameter is trainable."""
        device = next(self.parameters(), torch.empty(0)).device
        ids = [tensor.to(device) for tensor in self.tokenize(prompts)]
        trains = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            encoded = self.encode_ids(*ids)
        keep_promise(self, "encode_ids", lambda: self.wrong_conditioning(encoded, prompts))
        return encoded

    def wrong_conditioning(self, encoded: Conditioning, prompts: Sequence[str]) -> str | None:
        """Return what is wrong with encoded prompts, see :func:`~latentreward.core.promises.returns`."""
        if not isinstance(encoded, Conditioning):
            return f"{shown(encoded)}; it must be a Conditioning"
        tokens, pooled, mask = encoded.prompt_embeds, encoded.pooled_prompt_embeds, encoded.prompt_mask
        length = -1 if self.masked else self.num_tokens
        if problem := wrong_tensor(tokens, (len(prompts), length, self.token_dim)):
            return f"prompt_embeds {problem}, as num_tokens and token_dim say"
        wanted = (pooled is not None or self.pooled_dim > 0) and (len(prompts), self.pooled_dim)
        if wanted and (problem := wrong_tensor(pooled, wanted)):
            return f"pooled_prompt_embeds {problem}, as pooled_dim says"
        return self.wrong_mask(mask, tokens, prompts)

    def wrong_mask(self, mask: Tensor | None, tokens: Tensor, prompts: Sequence[str]) -> str | None:
        """Return what is wrong with a mask of encoded prompts, see :func:`~latentreward.core.promises.returns`."""
        if (mask is not None) != self.masked:
            return (
                f"{'no' if mask is None else 'a'} prompt_mask, but masked is {self.masked}; it must be a mask of the "
                "tokens that the network attends to with masked = True, or none with masked = False, where all count"
            )
        if mask is None:
            return None
        problem = wrong_tensor(mask, tokens.shape[:2], "bool")
        if problem or not VALUES.get():
            return problem and f"prompt_mask {problem}"
        counts = mask.sum(dim=1)
        if mask.shape[1] > self.num_tokens or not (mask.cummin(dim=1).values == mask).all() or not counts.all():
            return f"prompt_mask with {counts.tolist()} tokens; it must be 1 to {self.num_tokens} that come first"
        if counts.tolist() != (told := self.count_tokens(prompts)):
            return f"prompt_mask with {counts.tolist()} tokens; it must be as count_tokens says, {told}"
        return None


def encode_texts(encoder: PromptEncoder, prompts: Sequence[str]) -> Conditioning:
    """Encode B prompts to B rows, each distinct one once: T5 would otherwise run for each of a prompt's K samples."""
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    encoded: Conditioning = encoder(list(rows))
    return encoded if len(rows) == len(prompts) else encoded.select([rows[prompt] for prompt in prompts])


def empty_prompts(encoder: PromptEncoder | None, prompts: Sequence[str], text: str = "") -> list[str]:
    """Return the empty prompt ``text``: one, or one with each prompt's pictures where the encoder sees them."""
    edits = encoder is not None and encoder.sees_sources and any(map(sources_of, prompts))
    return [like_prompt(text, prompt) for prompt in prompts] if edits else [text]


def equal_lengths(encoder: PromptEncoder, prompts: Sequence[str], most: int) -> list[list[int]]:
    """Return the indices of ``prompts`` in batches of at most ``most`` prompts with equally many tokens.

    No prompt of such a batch is padded, so that its result differs from that of the prompt alone in the last bits only.
    """
    parts = (prompts[start : start + 1024] for start in range(0, len(prompts), 1024))  # each is padded to its longest
    counts = [count for part in parts for count in encoder.count_tokens(part)]
    rows = sorted(range(len(prompts)), key=counts.__getitem__)
    batches: list[list[int]] = []
    for row in rows:
        if not batches or len(batches[-1]) == most or counts[batches[-1][0]] != counts[row]:
            batches.append([])
        batches[-1].append(row)
    return batches


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Return token ids ``(B, length)``, int64 on the CPU, padded and truncated to ``length``."""
    return _padded(tokenizer, prompts, length).input_ids


def masked_ids(encoder: PromptEncoder, tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return :func:`token_ids` and their mask ``(B, length)``; the encoder warns of a text that is cut."""
    found = _padded(tokenizer, texts, length)
    encoder.tell_cut(tokenizer, texts, found.attention_mask.sum(dim=1).tolist(), length)
    return found.input_ids, found.attention_mask


def _padded(tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    if tokenizer is None:
        raise InputError("prompts were given as text, but there is no tokenizer; load it with its base pipeline")
    size = {"padding": "max_length", "truncation": True, "max_length": length}
    with torch.device("cpu"):
        return tokenizer(list(texts), **size, return_attention_mask=True, return_tensors="pt")
