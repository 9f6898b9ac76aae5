"""Mixtures compare like with like: each reward is normalised before it is weighed."""

import math
from collections.abc import Sequence

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from latentreward.alignment import CallableReward, PolicySource, RandomReward, RewardMixture, RewardSource
from latentreward.alignment.rewards.mixture import MixedReward, Normalise, standardise
from latentreward.core.checkpoints.shards import frozen_names
from latentreward.core.contracts import LatentSpace, NoisyStates
from latentreward.core.errors import InputError
from tests.tiny_pipelines import pipeline_folder

SPACE = LatentSpace(4, 8, 0.18215)


def first(latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
    return latents[:, 0, 0, 0]


def of_clean(latents: Tensor, timesteps: Tensor, prompts: Sequence[str], clean: Tensor) -> Tensor:
    return clean[:, 0, 0, 0]


def second(latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
    return 100 + 50 * latents[:, 1, 0, 0]


def mixture(weights: Sequence[float] | None = (1.0, 0.5), normalise: Normalise = "group") -> MixedReward:
    rewards = [CallableReward(function, differentiable=True) for function in (first, second)]
    return RewardMixture(rewards, weights, normalise).load(policy=None)  # type: ignore[arg-type]


def states(count: int = 6, seed: int = 0) -> NoisyStates:
    latents = torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    return NoisyStates(latents, torch.full((count,), 501.0), torch.arange(count) % 2)


def mixed(reward: MixedReward, of: NoisyStates) -> Tensor:
    return reward(of, reward.encode_prompts(["a", "b"]))


def test_states_of_a_prompt_are_standardised_under_each_reward() -> None:
    found, given = mixed(mixture(), states()), states()
    for row in range(2):
        parts = []
        for function in (first, second):
            raw = function(given.latents, given.timesteps, [])[given.rows == row].double()
            parts.append((raw - raw.mean()) / (raw.std(correction=0) + 1e-4))
        torch.testing.assert_close(found[given.rows == row].double(), parts[0] + 0.5 * parts[1], rtol=1e-4, atol=1e-5)


def test_equal_scores_are_zero_and_a_single_state_has_no_spread() -> None:
    assert torch.equal(standardise(torch.ones(4), torch.tensor([0, 0, 1, 1])), torch.zeros(4))
    with pytest.raises(InputError, match="got a single one; draw several candidates, or set normalise: running"):
        mixed(mixture(), states(3))


@pytest.mark.parametrize("normalise", ["group", "running", "none"])
def test_states_of_different_prompts_are_weighed_by_a_given_spread_and_count_as_unseen(normalise: Normalise) -> None:
    reward, parts = mixture((1.0, -0.5), normalise), torch.tensor([[1.0, 30.0], [2.0, -10.0]], dtype=torch.float64)
    scales = (1.0, 1.0) if normalise == "none" else (2.0 + 1e-4, 20.0 + 1e-4)
    found = reward.mix_apart(parts, torch.tensor([2.0, 20.0], dtype=torch.float64))
    torch.testing.assert_close(found, parts[:, 0] / scales[0] - 0.5 * parts[:, 1] / scales[1])
    assert reward.take_means() is None
    assert normalise != "running" or not reward.seen.any()


def test_means_are_those_of_the_scores_since_they_were_last_taken() -> None:
    reward = mixture(normalise="none")
    for seed in (1, 2):
        mixed(reward, states(6, seed))
        means = [function(states(6, seed).latents, torch.empty(0), []).double().mean() for function in (first, second)]
        torch.testing.assert_close(reward.take_means(), torch.stack(means))


def test_running_statistics_are_those_of_all_scores_so_far() -> None:
    reward = mixture((1.0, 0.0), "running")
    mixed(reward, states(6, seed=1))
    found = mixed(reward, states(6, seed=2))
    raw = torch.cat([states(6, seed).latents[:, 0, 0, 0] for seed in (1, 2)])
    expected = (raw[6:] - raw.mean()) / (raw.std(correction=0) + 1e-4)
    torch.testing.assert_close(found, expected)


def test_running_statistics_are_part_of_small_checkpoints() -> None:
    class Aligning(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.reward, self.policy = mixture(normalise="running"), nn.Linear(2, 2)

    module, restored = Aligning(), Aligning()
    mixed(module.reward, states())
    frozen = frozen_names(module)
    assert "reward.seen" not in frozen
    restored.load_state_dict({k: v for k, v in module.state_dict().items() if k not in frozen}, strict=False)
    again = states(seed=3)
    assert torch.equal(mixed(module.reward, again), mixed(restored.reward, again))


@pytest.mark.parametrize("normalise", ["group", "running", "none"])
def test_gradients_go_through_the_scores_alone(normalise: Normalise) -> None:
    reward, given = mixture((1.0, 0.0), normalise), states()
    latents = given.latents.clone().requires_grad_()
    total = mixed(reward, NoisyStates(latents, given.timesteps, given.rows)).sum()
    (gradient,) = torch.autograd.grad(total, latents)
    assert gradient.isfinite().all()
    assert (gradient[:, 0, 0, 0] > 0).all()
    assert not gradient[:, 1:].any()


def test_weights_and_needs() -> None:
    half = mixed(mixture(None, "none"), states())
    torch.testing.assert_close(half, mixed(mixture((0.5, 0.5), "none"), states()))
    rewards: list[RewardSource] = [CallableReward(of_clean, needs_clean=True), RandomReward("readout")]
    loaded = [source.load(None) for source in (rewards[0], CallableReward(first, differentiable=True))]
    both = MixedReward(loaded, (1.0, 1.0), "none")
    assert both.needs_clean
    assert not both.differentiable
    for weights in ((1.0,), (0.0, 0.0), (1.0, 2.0, 3.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(InputError, match="a finite weight for each, one of them not 0"):
            RewardMixture(rewards, weights)
    with pytest.raises(InputError, match="at least one reward"):
        RewardMixture([])


class Latent(CallableReward):
    """A function of latents of one space."""

    def __init__(self, space: LatentSpace) -> None:
        super().__init__(first)
        self.space = space

    def latent_space(self) -> LatentSpace:  # type: ignore[override]
        return self.space


def test_latent_spaces_must_agree() -> None:
    other = LatentSpace(16, 8, 1.5305, 0.0609)
    assert RewardMixture([CallableReward(first), Latent(SPACE)]).latent_space() == SPACE
    assert RewardMixture([CallableReward(first)]).latent_space() is None
    with pytest.raises(InputError, match=r"different spaces \(16 channels.*; 4 channels"):
        RewardMixture([Latent(SPACE), Latent(other)]).latent_space()
    with pytest.raises(InputError, match="the reward takes"):
        RewardMixture([Latent(other)]).require_latents_of(PolicySource(pipeline_folder("sd15")))
