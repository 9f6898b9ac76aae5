"""Encoders of prompts: base class, and those of SD, SD3 and of families with a language model."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from latentreward.core.contracts import Conditioning, like_prompt, sources_of
from latentreward.core.errors import InputError
from latentreward.core.promises import Part, keep_promise, returns, shown, wrong_tensor
from latentreward.core.running import phase

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

logger = logging.getLogger(__name__)


def _wrong_ids(found: tuple[Tensor, ...], encoder: PromptEncoder, prompts: Sequence[str]) -> str | None:
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
            If the network attends to all padding, give no mask.
        pools_tokens: Whether the pooled vector is the mean of the prompt's own tokens, which the network does not take.
        dropped_tokens: Number of tokens before the prompt's own whose embeddings a masked encoder drops.
        tokens_in_fingerprint: Whether the encoder's fingerprint covers the tokens of fixed prompts; not of SD's and
            SD3's, whose fingerprints caches hold.
        sees_sources: Whether the text encoder reads the pictures that prompts edit too.
        picture_settings: Settings of the reading of pictures on which the embeddings of prompts with pictures depend.
        unread: Names of submodules that no output depends on; they are frozen, as DDP fails without a gradient.
        tokens_only: Names of submodules that the token embeddings depend on, but not the pooled vector.
    """

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
    _settled: bool = False

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
        """Warn once if one of the ``texts``, with ``counts`` tokens, has more than the ``limit`` that are read."""
        for text, count in zip(texts, counts, strict=True):
            if self._told_cut or count < limit:  # where texts were truncated, they have at most the limit
                continue
            if (whole := len(tokenizer(text, verbose=False).input_ids)) > limit:
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
        if not self._settled:
            keep_promise(self, "encode_ids", self.wrong_conditioning, encoded, prompts)
            self._settled = True
        return encoded

    def wrong_conditioning(self, encoded: Conditioning, prompts: Sequence[str]) -> str | None:
        """Return what is wrong with encoded prompts, see :func:`~latentreward.core.promises.returns`."""
        if not isinstance(encoded, Conditioning):
            return f"{shown(encoded)}; it must be a Conditioning"
        tokens, pooled, mask = encoded.prompt_embeds, encoded.pooled_prompt_embeds, encoded.prompt_mask
        if problem := wrong_tensor(tokens, (len(prompts), -1 if self.masked else self.num_tokens, self.token_dim)):
            return f"prompt_embeds {problem}, as num_tokens and token_dim say"
        wanted = (pooled is not None or self.pooled_dim > 0) and (len(prompts), self.pooled_dim)
        if wanted and (problem := wrong_tensor(pooled, wanted)):
            return f"pooled_prompt_embeds {problem}, as pooled_dim says"
        problem = None
        if (mask is not None) != self.masked:
            problem = f"is {shown(mask)}, but masked is {self.masked}; it must be a mask if some tokens do not count"
        elif mask is not None and not (problem := wrong_tensor(mask, tokens.shape[:2], "bool")):
            counts, told, later = mask.sum(dim=1).tolist(), self.count_tokens(prompts), mask[:, 1:] > mask[:, :-1]
            if counts != told or 0 in counts or max(counts) > self.num_tokens or later.any():
                problem = f"with {counts} tokens; it must be 1 to {self.num_tokens} that come first, counted as {told}"
        return problem and f"prompt_mask {problem}"


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
    """Return the indices of ``prompts`` in batches of at most ``most`` with equally many tokens: none is padded."""
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


def check_length(t5_length: int, least: int, most: int) -> int:
    """Check a number of T5 tokens per prompt, and return it."""
    if type(t5_length) is not int or not least <= t5_length <= most:
        raise InputError(f"t5_length={t5_length!r} must be a whole number from {least} to {most} here")
    return t5_length


class CLIPPromptEncoder(PromptEncoder):
    """Prompt encoder with one CLIP text encoder (SD1.5, SD2.1).

    Token embeddings are the last hidden states after the final norm. The pooled vector is their row at the EOS token.
    No attention mask is used: padding tokens take part, as in training of the base models.
    """

    tokens_in_fingerprint = False

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.num_tokens = text_encoder.config.max_position_embeddings
        self.token_dim = self.pooled_dim = text_encoder.config.hidden_size

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return (masked_ids(self, self.tokenizer, prompts, self.num_tokens)[0],)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        output = self.text_encoder(input_ids[0])
        return Conditioning(output.last_hidden_state, output.pooler_output)


class SDXLPromptEncoder(PromptEncoder):
    """Prompt encoder with SDXL's two CLIP text encoders.

    Token embeddings are the second-to-last hidden states of both, concatenated along the features. The pooled vector is
    the second encoder's projected EOS feature.
    """

    tokens_in_fingerprint = False
    tokens_only = ("text_encoder",)

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.num_tokens = text_encoder.config.max_position_embeddings
        last = text_encoder.config.num_hidden_layers - 1
        self.unread = tuple(
            f"text_encoder.{name}"
            for name, _ in text_encoder.named_modules()
            if name.endswith((f"encoder.layers.{last}", "final_layer_norm"))
        )
        self.token_dim = text_encoder.config.hidden_size + text_encoder_2.config.hidden_size
        self.pooled_dim = text_encoder_2.config.projection_dim

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return (
            masked_ids(self, self.tokenizer, prompts, self.num_tokens)[0],
            token_ids(self.tokenizer_2, prompts, self.num_tokens),
        )

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        first = self.text_encoder(input_ids[0], output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(input_ids[1], output_hidden_states=True)
        return Conditioning(torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds)


class SD3PromptEncoder(PromptEncoder):
    """Prompt encoder with SD3's three text encoders: CLIP-L, CLIP-G and T5.

    The CLIP tokens are the second-to-last hidden states of CLIP-L and CLIP-G, concatenated along the features and
    zero-padded to ``token_dim``. T5's tokens follow along the token axis. The pooled vector is the projected EOS
    features of CLIP-L and CLIP-G, concatenated. No attention mask is used: padding tokens take part.

    Args:
        text_encoder: CLIP-L with projection.
        text_encoder_2: CLIP-G with projection.
        text_encoder_3: T5 encoder; None replaces T5's tokens by zeros.
        tokenizer: Tokenizer of CLIP-L.
        tokenizer_2: Tokenizer of CLIP-G.
        tokenizer_3: Tokenizer of T5.
        token_dim: Width of the token embeddings that the network takes (``joint_attention_dim``).
        t5_length: Number of T5 tokens per prompt; without T5 the number of zero tokens, which SD3 saw in training
            whenever T5 was dropped.

    Note:
        DiNa-LRM was trained with 128 T5 tokens; its published example scores with 256.
    """

    tokens_in_fingerprint = False

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        *,
        token_dim: int,
        t5_length: int = 256,
    ) -> None:
        super().__init__()
        check_length(t5_length, 0, 4096)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.text_encoder_3, self.tokenizer_3 = text_encoder_3, tokenizer_3
        self.tokens_only = () if text_encoder_3 is None else ("text_encoder_3",)
        self.clip_length = text_encoder.config.max_position_embeddings
        self.t5_length = t5_length
        self.num_tokens = self.clip_length + t5_length
        self.token_dim = token_dim
        self.pooled_dim = text_encoder.config.projection_dim + text_encoder_2.config.projection_dim

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        second = token_ids(self.tokenizer_2, prompts, self.clip_length)
        if self.text_encoder_3 is None:
            return masked_ids(self, self.tokenizer, prompts, self.clip_length)[0], second
        first = token_ids(self.tokenizer, prompts, self.clip_length)
        return first, second, masked_ids(self, self.tokenizer_3, prompts, self.t5_length)[0]

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        clip_l = self.text_encoder(input_ids[0], output_hidden_states=True)
        clip_g = self.text_encoder_2(input_ids[1], output_hidden_states=True)
        clip = torch.cat([clip_l.hidden_states[-2], clip_g.hidden_states[-2]], dim=-1)
        clip = F.pad(clip, (0, self.token_dim - clip.shape[-1]))
        if self.text_encoder_3 is None:
            t5 = clip.new_zeros(len(clip), self.t5_length, self.token_dim)
        else:
            t5 = self.text_encoder_3(input_ids[2]).last_hidden_state.to(clip.dtype)
        return Conditioning(torch.cat([clip, t5], dim=1), torch.cat([clip_l.text_embeds, clip_g.text_embeds], dim=-1))


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
    """Remove layers after the first ``count``, in place; and then the final norm, which ends a model left whole."""
    if len(model.layers) < count:
        told = f"layer {count} of a text encoder is read, but this one has {len(model.layers)}"
        raise InputError(f"{told}; get the pipeline as published")
    if len(model.layers) > count:
        model.layers, model.norm = model.layers[:count], nn.Identity()
    return model


def without_last_layer(model: Any) -> Any:
    """Remove the last layer and the final norm of a base model, in place, so that it returns ``hidden_states[-2]``."""
    model.layers = model.layers[:-1]
    model.norm = nn.Identity()
    return model
