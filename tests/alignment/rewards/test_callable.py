"""Functions as rewards, and controls whose numbers depend on their seed and on what they score alone."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import CallableReward, Policy, RandomReward, Reward
from latentreward.core.contracts import NoisyStates
from latentreward.core.errors import InputError
from tests.alignment.rewards.stored import PROMPTS, states_of, tiny_policy

policy_of = cache(tiny_policy)


@pytest.fixture
def policy() -> Policy:
    return policy_of("sd15")


def brightness(latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
    assert list(prompts) == [PROMPTS[row % len(PROMPTS)] for row in range(len(latents))]
    return latents.mean(dim=(1, 2, 3)) + timesteps / 1000


def scores(source: Any, policy: Policy, states: NoisyStates) -> Tensor:
    reward = source.load(policy)
    return reward(states, reward.encode_prompts(PROMPTS))


def test_a_function_is_a_reward(policy: Policy) -> None:
    states, source = states_of(policy), CallableReward(brightness)
    assert source.latent_space() is None
    assert torch.equal(scores(source, policy, states), brightness(states.latents, states.timesteps, PROMPTS * 2))


def test_it_may_ask_for_the_prediction_of_the_finished_latents(policy: Policy) -> None:
    def clean_mean(latents: Tensor, timesteps: Tensor, prompts: Sequence[str], clean: Tensor) -> Tensor:
        return clean.mean(dim=(1, 2, 3))

    reward = CallableReward(clean_mean, needs_clean=True, differentiable=True).load(policy)
    assert reward.needs_clean
    finished = torch.randn(2, 4, 8, 8, requires_grad=True)
    found = reward.score_clean(finished, torch.arange(2), reward.encode_prompts(PROMPTS))
    (gradient,) = torch.autograd.grad(found.sum(), finished)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 256))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda latents, timesteps, prompts: latents.mean(), r"returned \(\) for 4 states"),
        (lambda latents, timesteps, prompts: 1.0, "returned 1.0 for 4 states"),
        (lambda latents, timesteps, prompts: latents[:, 0, 0, 0].log() * float("nan"), "returned nan at timestep"),
    ],
)
def test_what_is_no_score_is_refused(function: Any, message: str, policy: Policy) -> None:
    with pytest.raises(InputError, match=message):
        scores(CallableReward(function), policy, states_of(policy))


class Darker(Reward):
    """A user's own reward that changes what it scores."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        return prompts

    def score(self, states: NoisyStates, encoded: Any) -> Tensor:
        return states.latents.sub_(1).mean(dim=(1, 2, 3))

    def score_clean(self, latents: Tensor, *args: Any, **options: Any) -> Tensor:
        latents[0] = 0
        return latents.mean(dim=(1, 2, 3))


def fill(latents: Tensor, timesteps: Tensor, prompts: Sequence[str], clean: Tensor | None = None) -> Tensor:
    (latents if clean is None else clean).clamp_(-1, 1)
    return latents.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("load", "method", "name"),
    [
        (CallableReward(fill).load, "score", r"reward CallableReward \(test_callable.py:\d+\)"),
        (CallableReward(fill, needs_clean=True).load, "score_clean", r"reward CallableReward \(test_callable.py:\d+\)"),
        (lambda policy: Darker(), "score", "reward Darker"),
        (lambda policy: Darker(), "score_clean", "reward Darker"),
    ],
)
def test_a_reward_that_changes_what_is_trained_on_is_refused(load: Any, method: str, name: str, policy: Policy) -> None:
    """In every call, since one that comes later would change what is trained on as well."""
    reward, states = load(policy), states_of(policy)
    for _ in range(2):
        with pytest.raises(InputError, match=rf"^{name} changes a tensor \(4, 4, 8, 8\) that it is given, .*clone\(\)"):
            if method == "score":
                reward(states, reward.encode_prompts(PROMPTS))
            else:
                reward.begin_parts(states.latents, states.rows, reward.encode_prompts(PROMPTS))()


@pytest.mark.parametrize("kind", ["noise", "readout"])
def test_random_scores_depend_on_seed_and_state_alone(kind: Any, policy: Policy) -> None:
    states = states_of(policy)
    found = scores(RandomReward(kind, seed=1), policy, states)
    assert torch.equal(found, scores(RandomReward(kind, seed=1), policy, states))
    assert not torch.equal(found, scores(RandomReward(kind, seed=2), policy, states))
    order = torch.tensor([2, 0])
    part = NoisyStates(states.latents[order], states.timesteps[order], states.rows[order])
    torch.testing.assert_close(scores(RandomReward(kind, seed=1), policy, part), found[order])


@pytest.mark.parametrize("kind", ["noise", "readout"])
def test_random_scores_have_the_asked_spread(kind: Any, policy: Policy) -> None:
    latents = torch.randn(1000, 4, 8, 8)
    states = NoisyStates(latents, torch.full((1000,), 501.0), torch.zeros(1000, dtype=torch.int64))
    assert scores(RandomReward(kind, scale=2.0), policy, states).std().item() == pytest.approx(2.0, rel=0.15)


def test_the_readout_of_a_clip_is_the_mean_over_its_frames(policy: Policy) -> None:
    clips, rows = torch.randn(2, 4, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    found, *frames = (
        scores(RandomReward("readout", seed=1), policy, NoisyStates(latents, torch.full((2,), 501.0), rows))
        for latents in (clips, *clips.unbind(2))
    )
    torch.testing.assert_close(found, torch.stack(frames).mean(dim=0))


def test_the_readout_has_gradients_and_the_noise_has_none(policy: Policy) -> None:
    states = states_of(policy)
    latents = states.latents.clone().requires_grad_()
    with_graph = NoisyStates(latents, states.timesteps, states.rows)
    (gradient,) = torch.autograd.grad(scores(RandomReward("readout"), policy, with_graph).sum(), latents)
    assert gradient.abs().min(dim=0).values.max() > 0
    assert RandomReward("readout").load(policy).differentiable
    assert not RandomReward("noise").load(policy).differentiable
    with pytest.raises(InputError, match="scale=0 must be positive"):
        RandomReward(scale=0)
    with pytest.raises(InputError, match="scale=inf must be positive and finite"):
        RandomReward(scale=math.inf)
