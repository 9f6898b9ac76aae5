"""SD3's prompt encoding from three text encoders."""

import pytest
import torch
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from latentreward.diffusion.backbones.loading import load_weights
from latentreward.diffusion.encoders.prompts import SD3PromptEncoder
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close


@pytest.mark.parametrize("case", cases("dina/prompt"), ids=lambda case: case.name)
@torch.no_grad()
def test_prompt_encoding(case: Case) -> None:
    data = case.tensors()
    clip_l, clip_g = (
        load_weights(CLIPTextModelWithProjection, str(case.folder(name))) for name in ("clip_l", "clip_g")
    )
    t5 = load_weights(T5EncoderModel, str(case.folder("t5")))
    encoder = SD3PromptEncoder(clip_l, clip_g, t5, token_dim=t5.config.d_model, t5_length=case.options["t5_len"])
    encoded = encoder.encode_ids(data["in.ids_clip"], data["in.ids_clip"], data["in.ids_t5"])
    embeds, pooled = encoded.prompt_embeds, encoded.pooled_prompt_embeds
    assert_close(embeds, data["out.prompt_embeds"], "prompt_embeds")
    assert_close(pooled, data["out.pooled"], "pooled")
    clip_tokens = data["in.ids_clip"].shape[1]
    widths = [clip_l.config.hidden_size, clip_g.config.hidden_size]
    hidden_l, hidden_g, padding = embeds[:, :clip_tokens].tensor_split([widths[0], sum(widths)], dim=-1)
    assert_close(hidden_l, data["clip_l.hidden_-2"], "clip_l.hidden_-2")
    assert_close(hidden_g, data["clip_g.hidden_-2"], "clip_g.hidden_-2")
    assert (padding == 0).all()
    assert_close(embeds[:, clip_tokens:], data["t5.last"], "t5.last")
    pooled_l, pooled_g = pooled.tensor_split([clip_l.config.projection_dim], dim=-1)
    assert_close(pooled_l, data["clip_l.pooled"], "clip_l.pooled")
    assert_close(pooled_g, data["clip_g.pooled"], "clip_g.pooled")
    assert embeds.shape[1:] == (encoder.num_tokens, encoder.token_dim)
