"""Facts of ERNIE-Image that the tests of all families cannot see."""

from typing import Any

import pytest
import torch

from tests.diffusion.families.twins import PROMPTS, TWINS

TWIN = TWINS["ernie_image"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return TWIN.pipeline()


def test_prompts_are_encoded_as_by_the_pipeline(pipeline: Any) -> None:
    encoder = TWIN.source().resolve_family().load_prompt_encoder()
    encoder.tokenizer.padding_side = "left"
    with torch.no_grad():
        found = encoder([*PROMPTS, ""])
    want = pipeline.encode_prompt([*PROMPTS, ""], torch.device("cpu"))
    assert found.prompt_mask.sum(dim=1).tolist() == [len(states) for states in want]
    torch.testing.assert_close(found.prompt_embeds[found.prompt_mask], torch.cat(want), rtol=0, atol=1e-5)


def test_guidance_is_that_of_the_pipeline_and_one_switches_it_off() -> None:
    family = TWIN.source().resolve_family()
    assert family.guidance(None) == 4.0
    assert not family.needs_uncond(1.0)
    assert "for Turbo set guidance_scale to 1" in family.assumption()


@pytest.mark.parametrize("steps", [4, 50])
def test_levels_are_shifted_by_four(steps: int) -> None:
    family = TWIN.source().resolve_family()
    levels = torch.linspace(1.0, 0.0, steps + 1)
    want = 4 * levels / (1 + 3 * levels)
    torch.testing.assert_close(family.levels(steps, family.latent_shape())[1], want)


def test_only_the_layers_that_are_read_of_the_language_model_are_kept() -> None:
    encoder = TWIN.source().resolve_family().load_prompt_encoder()
    assert len(encoder.text_encoder.layers) == 2
    encoder(PROMPTS).prompt_embeds.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
