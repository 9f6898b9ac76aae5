"""Facts of HiDream-I1 that the tests of all families cannot see."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import PolicySource
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion.families.hidream import mixed
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for

TWIN = TWINS["hidream"]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., str]:
    """Copies the twin with other entries of one of its configs."""

    def edit(part: str, **changes: Any) -> str:
        folder = copytree(TWIN.folder, tmp_path / "copy")
        names = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
        file = folder / names.get(part, f"{part}/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return str(folder)

    return edit


def test_a_picture_that_is_not_square_is_padded_as_by_the_network(edited: Callable[..., str]) -> None:
    source = edited("transformer", max_resolution=[8, 8])  # 16 tokens; the twin's 6 need no padding
    policy = PolicySource(source).load().eval()
    latents, levels = noise_for(policy.latent_shape(*TWIN.size)), torch.tensor([300.0, 800.0])
    options = {"visual_taps": [4], "text_taps": [2, 4], "output_map": True, "tuning": "frozen"}
    backbone = create_backbone("hidream", source=source, **options).eval()
    with torch.no_grad():
        expected = policy.predict(latents, levels, policy.encode_prompts(PROMPTS))
        features = backbone(latents, levels, backbone.encode_prompts(PROMPTS))
        plain = TWIN.source().load().eval()
        unpadded = plain.predict(latents, levels, plain.encode_prompts(PROMPTS))
    torch.testing.assert_close(features.output, expected, rtol=1e-5, atol=1e-6)
    assert (expected - unpadded).abs().max() > 1e-3  # padding takes part
    assert features.visual[0].shape[1] == 6 and features.text[0].shape[1] == 2 * 128
    assert features.text_mask is None  # every token is one of text


def test_sizes_that_the_network_cannot_pad_are_refused() -> None:
    family = TWIN.source().resolve_family()
    assert family.latent_shape(64, 64) == (16, 8, 8)
    with pytest.raises(InputError, match="HiDream-I1 takes pictures that are not square of at most 6 tokens, and 4 ×"):
        family.latent_shape(64, 32)


def experts() -> Any:
    return TWIN.pipeline().transformer.double().double_stream_blocks[0].block.ff_i


def test_experts_give_what_diffusers_gives() -> None:
    module, states = experts().eval(), torch.randn(2, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixed(module, states), module(states), rtol=0, atol=1e-12)


def test_experts_have_a_gradient_in_evaluation_mode() -> None:
    states = torch.randn(2, 7, 24, dtype=torch.float64)

    def slope(function: Callable[[Any, Tensor], Tensor], training: bool) -> Tensor:
        given = states.clone().requires_grad_()
        function(experts().train(training), given).square().sum().backward()
        assert given.grad is not None
        return given.grad

    whole = slope(lambda module, given: module(given), training=True)
    torch.testing.assert_close(slope(mixed, training=False), whole, rtol=0, atol=1e-10)
    assert (slope(lambda module, given: module(given), training=False) - whole).norm() > 1e-3 * whole.norm()
    network = TWIN.source().load().eval().network
    assert all(block.block.ff_i.forward.func is mixed for block in network.double_stream_blocks)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"llama_layers": [0, 1, 2, -1]}, r"llama_layers\[3\]: it must be greater than or equal to 0"),
        ("transformer", {"llama_layers": [0, 1, 2, 3]}, "layer 4 of a text encoder is read, but this one has 3"),
        ("", {"text_encoder_4": [None, None]}, "has no text_encoder_4: HiDream-I1 is published without Llama-3.1-8B"),
        ("scheduler", {"_class_name": "FlowMatchLCMScheduler"}, "of networks distilled to few steps"),
        ("scheduler", {"use_flow_sigmas": False}, "has use_flow_sigmas=false; set it to true there"),
    ],
)
def test_wrong_configs_are_one_line(
    edited: Callable[..., str], part: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        family = PolicySource(edited(part, **changes)).resolve_family()
        family.levels(4, family.latent_shape(32, 32))
        family.load_prompt_encoder()
    assert "\n" not in str(refused.value)
