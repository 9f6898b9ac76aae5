"""Prompt encoders of SD1.5, SD2.1 and SDXL."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from latentreward.core.contracts import Conditioning
from latentreward.diffusion.encoders.prompts import PromptEncoder, masked_ids, token_ids


class CLIPPromptEncoder(PromptEncoder):
    """Prompt encoder with one CLIP text encoder (SD1.5, SD2.1).

    Token embeddings are the last hidden states after the final norm. The pooled vector is their row at the EOS token.
    No attention mask is used: padding tokens take part, as in training of the base models.

    Args:
        text_encoder: CLIP text encoder.
        tokenizer: Tokenizer of ``text_encoder``; None if only token ids are encoded.
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

    Args:
        text_encoder: CLIP-L; no output depends on its last layer and final norm, which therefore do not train.
        text_encoder_2: CLIP-G with projection.
        tokenizer: Tokenizer of ``text_encoder`` (pads with EOS).
        tokenizer_2: Tokenizer of ``text_encoder_2`` (pads with id 0).
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
