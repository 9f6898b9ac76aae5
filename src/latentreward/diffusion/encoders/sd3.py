"""Prompt encoder of SD3 and SD3.5."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError
from latentreward.diffusion.encoders.prompts import PromptEncoder, masked_ids, token_ids

MOST_TOKENS = 4096  # largest number of T5 tokens per prompt


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

    Raises:
        InputError: If ``t5_length`` is not a whole number from 0 to :data:`MOST_TOKENS`.

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
        if type(t5_length) is not int or not 0 <= t5_length <= MOST_TOKENS:
            raise InputError(f"t5_length is {t5_length!r}; give a whole number from 0 to {MOST_TOKENS}")
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
