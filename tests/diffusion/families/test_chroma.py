"""Facts of Chroma that the tests of all families cannot see."""

from typing import Any

import pytest
import torch

from latentreward.diffusion.families.chroma import joint_mask, masked_checkpoints
from tests.diffusion.families.twins import PROMPTS, TWINS

TWIN = TWINS["chroma"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return TWIN.pipeline()


def test_prompts_are_encoded_as_by_the_pipeline_with_one_token_of_padding(pipeline: Any) -> None:
    encoder = TWIN.source().resolve_family().load_prompt_encoder()
    with torch.no_grad():
        found = encoder([*PROMPTS, ""])
    want, mask = pipeline._get_t5_prompt_embeds([*PROMPTS, ""])
    assert want.shape[1] == encoder.num_tokens == 512
    assert found.prompt_mask.sum(dim=1).tolist() == mask.sum(dim=1).tolist() == encoder.count_tokens([*PROMPTS, ""])
    assert found.prompt_embeds.shape[1] == mask.sum(dim=1).max()
    torch.testing.assert_close(found.prompt_embeds[found.prompt_mask], want[mask.bool()].detach(), rtol=0, atol=1e-5)
    assert encoder(["a " * 600]).prompt_mask.all()  # no room for padding


def test_the_mask_is_left_out_where_all_tokens_take_part() -> None:
    encoder = TWIN.source().resolve_family().load_prompt_encoder()
    assert joint_mask(encoder(PROMPTS[:1]), (2, 3)) is None
    mask = joint_mask(encoder(PROMPTS), (2, 3))
    assert mask is not None and mask.dtype == torch.bool and mask[:, -6:].all() and not mask.all()


def test_single_blocks_get_the_mask_with_gradient_checkpointing() -> None:
    network = TWIN.source(gradient_checkpointing=True).load().network.train()
    plain, mask = network._gradient_checkpointing_func, torch.ones(1, 2, dtype=torch.bool)
    given = []
    network._gradient_checkpointing_func = lambda block, *inputs: given.append(inputs)
    with masked_checkpoints(network, mask):
        network._gradient_checkpointing_func(None, "states", "temb", "rope")
        network._gradient_checkpointing_func(None, "visual", "text", "temb", "rope", mask)
    assert [len(inputs) for inputs in given] == [4, 5] and given[0][3] is mask
    assert network._gradient_checkpointing_func is not plain
    network._gradient_checkpointing_func = plain
    with pytest.raises(KeyError), masked_checkpoints(network, mask):
        raise KeyError
    assert network._gradient_checkpointing_func == plain
