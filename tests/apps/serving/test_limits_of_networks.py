"""What a network has no positions for, and clips of other lengths than those of the training, are refused."""

import httpx
import pytest
import torch
from safetensors.torch import save

from latentreward.core.registry import create_backbone
from latentreward.data.image_sizes import OneSize
from latentreward.reward import CLIPProjectionHead, RewardModel
from tests.apps.serving.latent_requests import HEADERS, tensors_of
from tests.apps.serving.servers import serving
from tests.diffusion.families.twins import TWINS


def reward(name: str, frames: int = 1) -> RewardModel:
    twin = TWINS[name]
    torch.manual_seed(0)
    options = {"visual_taps": [1], "text_taps": [], "tuning": "frozen"}
    backbone = create_backbone(twin.backbone, source=twin.folder, **options)
    model = RewardModel(backbone, CLIPProjectionHead(backbone.feature_spec, embed_dim=8))
    model.image_sizes = OneSize(32, 32, frames=frames)
    return model.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "longest"), [("lumina2", 299), ("z_image", 992)])
def test_prompts_and_sides_without_positions(name: str, longest: int) -> None:
    with serving(reward(name), max_latent_pixels=2 * 130) as (address, service):  # of 8 × 8 by default
        good, long = (tensors_of(service.accepted, tokens=tokens) for tokens in (longest, longest + 1))
        padded = long | {"prompt_mask": torch.arange(longest + 1).expand(1, -1) < longest}
        generator = torch.Generator().manual_seed(0)
        sides = [torch.randn(1, 16, 2, side, generator=generator) for side in (128, 130)]
        replies = [
            httpx.post(f"{address}/v1/score", content=save(tensors), headers=HEADERS, timeout=300)
            for tensors in (good, padded, long, *(good | {"latents": latents} for latents in sides))
        ]
    assert [reply.status_code for reply in replies] == [200, 200, 422, 200, 422]
    assert f"a prompt of {longest + 1} tokens is over {longest}, the limit of this network" in replies[2].text
    assert "at most 128, the limit of this network" in replies[4].text


@pytest.mark.parametrize(("name", "frames", "taken"), [("qwen_image", 1, 1), ("wan21", 1, 1), ("wan21", 5, 2)])
def test_clips_have_the_number_of_frames_of_the_training(name: str, frames: int, taken: int) -> None:
    with serving(reward(name, frames)) as (address, service):
        assert service.accepted.frames == taken
        good = tensors_of(service.accepted, tokens=service.accepted.tokens or 5)
        for number in (1, 2, 3):
            tensors = good | {"latents": torch.zeros(1, service.accepted.channels, number, 8, 8)}
            reply = httpx.post(f"{address}/v1/score", content=save(tensors), headers=HEADERS, timeout=300)
            assert reply.status_code == (200 if number == taken else 422), reply.text
            assert number == taken or f"of shape (B, C, T, h, w), with T = {taken}" in reply.text
