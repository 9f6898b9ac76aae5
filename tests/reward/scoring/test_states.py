"""Whole trajectories in one call: each state scored as alone, with its own prompt and timestep."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError
from latentreward.reward import RewardModel
from tests.reward.scoring.models import pictures, scoring_model
from tests.tiny_pipelines import LATENTS

PROMPTS = ["a cat", "two dogs", ""]
TIMES = torch.tensor([900.0, 500.0, 20.0, 0.0])


@pytest.fixture(scope="module", params=["sd15", "sd35"])
def model(request: pytest.FixtureRequest) -> RewardModel:
    return scoring_model(request.param)


def states(count: int = 3, steps: int = 4) -> Tensor:
    return torch.randn(count, steps, 4, LATENTS, LATENTS, generator=torch.Generator().manual_seed(0))


def test_each_state_gets_the_score_that_the_network_gives_it(model: RewardModel) -> None:
    latents, scores = states(), model.score_states(PROMPTS, states(), TIMES)
    assert scores.shape == (3, 4) and not scores.requires_grad
    for row, prompt in enumerate(PROMPTS):
        conditioning, uncond = model.encode_prompts([prompt])
        for step in range(4):
            alone = model(latents[row, step][None], TIMES[step][None], conditioning, uncond)
            torch.testing.assert_close(scores[row, step], alone[0], atol=2e-5, rtol=1e-4)


def test_a_prompt_is_encoded_once_or_taken_as_given(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], model.backbone.encode_prompts

    def counted(prompts: Sequence[str]) -> Conditioning:
        encoded.extend(prompts)
        return encode(prompts)

    given = model.encode_prompts(PROMPTS)
    monkeypatch.setattr(model.backbone, "encode_prompts", counted)
    scores = model.score_states(PROMPTS, states(), TIMES, batch_size=2)
    assert sorted(filter(None, encoded)) == ["a cat", "two dogs"]
    encoded.clear()
    again = model.score_states(PROMPTS, states(), TIMES, conditioning=given, batch_size=2)
    assert not encoded
    torch.testing.assert_close(scores, again, atol=2e-5, rtol=1e-4)


def test_gradients_reach_the_states(model: RewardModel) -> None:
    latents = states().requires_grad_()
    model.score_states(PROMPTS, latents, TIMES, batch_size=4).sum().backward()
    assert latents.grad.flatten(2).abs().sum(dim=2).gt(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(3, 4, 8)}, "give floating point"),
        ({"latents": torch.zeros(3, 4, 4, 8, 8, dtype=torch.int64)}, "give floating point"),
        ({"timesteps": TIMES[:3]}, "timesteps have shape"),
        ({"timesteps": torch.tensor([1.0, 2.0, 3.0, float("nan")])}, "timestep nan"),
        ({"prompts": ["one"]}, "prompts: 1 for 3"),
        ({"axes": True}, "has no two axes"),
        ({"latents": torch.full((3, 4, 4, LATENTS, LATENTS), torch.nan)}, "not finite"),
    ],
)
def test_wrong_input(model: RewardModel, change: dict[str, Any], message: str) -> None:
    given = {"prompts": PROMPTS, "latents": states(), "timesteps": TIMES} | change
    with pytest.raises(InputError) as caught:
        model.score_states(given.pop("prompts"), given.pop("latents"), given.pop("timesteps"), **given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("scale", "times", "message"),
    [
        (1.0, TIMES / 1000, r"all timesteps lie in \[0, 1\], .* give 1000 times the level"),
        (14.6, TIMES, r"have standard deviation 14\.\d, where .* divide .* by √\(σ² \+ 1\)"),
        (1.0, TIMES, None),
        (1.0, torch.tensor([1.0, 0.0, 1.0, 0.0]), None),
    ],
)
def test_states_of_another_scale_are_doubted(
    scale: float, times: Tensor, message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    scoring_model("sd15").score_states(["a cat"] * 3, scale * states(), times)
    assert len(caplog.messages) == (message is not None)
    assert message is None or re.search(message, caplog.text)


def test_a_memory_keeps_encoded_prompts_between_calls(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], model.backbone.encode_prompts

    def counted(prompts: Sequence[str]) -> Conditioning:
        encoded.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(model.backbone, "encode_prompts", counted)
    memory = model.prompt_memory(2)
    first = model.score(["a", "b"], pictures(2), memory=memory)
    encoded.clear()
    assert torch.equal(model.score(["a", "b"], pictures(2), memory=memory), first) and not encoded
    model.score("c", pictures(1), memory=memory)  # a is forgotten
    encoded.clear()
    model.score(["b", "a"], pictures(2), memory=memory)
    assert encoded == ["a"]
    with pytest.raises(InputError, match="count is 0"):
        model.prompt_memory(0)
