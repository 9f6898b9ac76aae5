"""Facts of Lumina-Image 2.0 that the tests of all families cannot see."""

import pytest
import torch

from latentreward.diffusion.families.lumina2 import SYSTEM
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for

TWIN = TWINS["lumina2"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_encoded_as_by_the_pipeline_the_negative_one_without_the_system_sentence(side: str) -> None:
    policy = TWIN.source().load().eval()
    encoder, pipeline = policy.text_encoder, TWIN.pipeline()
    encoder.tokenizer.padding_side = side
    assert f"{pipeline.system_prompt} <Prompt Start> " == SYSTEM
    with torch.no_grad():
        found = encoder([*PROMPTS, ""])
    want, mask, without, mask_without = pipeline.encode_prompt([*PROMPTS, ""])
    assert found.prompt_mask.sum(dim=1).tolist() == mask.sum(dim=1).tolist()
    assert mask_without.sum(dim=1).tolist() == [1, 1, 1]
    torch.testing.assert_close(found.prompt_embeds[found.prompt_mask], want[mask.bool()].detach(), rtol=0, atol=1e-5)
    for uncond in (policy.encode_uncond(), encoder([policy.family.uncond_prompt])):  # EncodeOnce stores it as a prompt
        assert uncond.prompt_mask.tolist() == [[True]]
        torch.testing.assert_close(uncond.prompt_embeds[0, 0].detach(), without[0, 0].detach(), rtol=0, atol=1e-5)


def test_guidance_keeps_the_norm_of_each_row() -> None:
    family = TWIN.source().resolve_family()
    with_prompt, without = noise_for((16, 4, 6)), noise_for((16, 4, 6), seed=1)
    guided = family.guide(with_prompt, without, 4.0)
    torch.testing.assert_close(guided.norm(dim=-1), with_prompt.norm(dim=-1))
    plain = without + 4.0 * (with_prompt - without)
    torch.testing.assert_close(guided / guided.norm(dim=-1, keepdim=True), plain / plain.norm(dim=-1, keepdim=True))


def test_the_table_of_positions_has_values_on_the_meta_device() -> None:
    family = TWIN.source().resolve_family()
    want = family.load_network().rope_embedder.freqs_cis
    with torch.device("meta"):
        network = family.load_network()
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    torch.testing.assert_close(network.rope_embedder.freqs_cis, want)
