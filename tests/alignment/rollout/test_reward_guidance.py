"""Guidance by a reward: what it moves, what it leaves, and that samples rise while log-probabilities are unguided."""

from pathlib import Path

import pytest
import torch

from latentreward.alignment import (
    GuidedSampler,
    LatentReward,
    PolicySource,
    RewardGuidance,
    Sampling,
    Transition,
    reward_gradient,
    sample_guided,
    sample_latents,
    sample_trajectories,
)
from latentreward.core.contracts import NoisyStates, PromptBatch
from tests.alignment.policies.alignment import tiny_source
from tests.alignment.rewards.stored import write_run
from tests.apps.generation.toy_rewards import MeanLatent
from tests.marks import rotated_after

PROMPTS = PromptBatch(("a large red circle on a white background", "two blue crosss on a gray background"), ("0", "1"))


def test_the_shift_is_the_step_variance_over_twice_beta() -> None:
    """Whatever part of the standard deviation is the spread, s²Δ / 2β is the variance over 2β."""
    std = torch.tensor([0.0, 0.3, 0.5])
    gradient, mean = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    for spread in (std, 2 * std):
        guided = RewardGuidance(beta=0.5).guide(Transition(mean, std, spread), gradient)
        torch.testing.assert_close(guided.shift, std.view(3, 1, 1, 1) ** 2 * gradient)
    assert not guided.shift[0].any()


@pytest.mark.parametrize("normalise", [False, True])
def test_no_gradient_no_guidance(normalise: bool) -> None:
    mean, ones = torch.randn(2, 3, 4), torch.ones(2)
    guided = RewardGuidance(normalise=normalise).guide(Transition(mean, ones, ones), torch.zeros(2, 3, 4))
    assert torch.equal(guided.guided.mean, mean)


def test_gradient_is_that_of_each_state() -> None:
    states = NoisyStates(torch.randn(3, 2, 4, 4), torch.ones(3), torch.arange(3))
    with torch.no_grad():
        slope = reward_gradient(MeanLatent(), states, ("",) * 3)
    torch.testing.assert_close(slope, torch.full_like(slope, 1 / 32))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [("lrm", "sd15"), ("dina", "sd35")])
def test_a_trained_reward_on_the_policys_own_network_guides_alike(method: str, name: str, tmp_path: Path) -> None:
    write_run(tmp_path, method, name, tuning="lora", lora={"rank": 2, "alpha": 4.0}, text_encoder_tuning="frozen")
    sampling, guidance = Sampling(4).with_noise(), RewardGuidance(scale=5.0, high=1000.0)
    found = []
    for share in ("never", "auto"):
        policy = tiny_source(name).load().eval()
        reward = LatentReward(str(tmp_path), share=share).load(policy)
        found.append(sample_guided(policy, reward, PROMPTS, guidance, sampling, 2.0, seed=0))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found[0], sample_latents(policy, PROMPTS, sampling, 2.0, seed=0), atol=1e-2)


@pytest.mark.parametrize("source", rotated_after(1, ["sd35_tiny", "sd_tiny"]))
def test_guided_samples_score_higher_in_the_window(source: str) -> None:
    policy, sampling = PolicySource(source).load().eval(), Sampling(5).with_noise()
    sampler = sampling.sampler(policy.family)
    low = sampler.timesteps[3].item()
    guidance = RewardGuidance(scale=40.0, low=low, high=sampler.timesteps[2].item())
    guided = GuidedSampler(sampler, guidance, MeanLatent(), PROMPTS.prompts)
    plain, moved = (sample_trajectories(policy, which, PROMPTS, sampling, 1.0, seed=0) for which in (sampler, guided))
    assert torch.equal(plain.latents[:3], moved.latents[:3])
    assert (moved.latents[3].flatten(1).mean(dim=1) > plain.latents[3].flatten(1).mean(dim=1) + 0.01).all()
    assert torch.equal(plain.log_prob[:2], moved.log_prob[:2])
    assert not torch.allclose(plain.log_prob[2], moved.log_prob[2])
    mean = sampler.transition(moved.latents[2], torch.zeros_like(moved.latents[2]), sampler.timesteps[2].repeat(2))
    wanted = guidance.guide(mean, torch.full_like(mean.mean, 1 / mean.mean[0].numel())).shift
    found = (moved.latents[3] - plain.latents[3]).cpu()
    torch.testing.assert_close(found, wanted.cpu(), rtol=1e-3, atol=1e-5)
