"""GRPO learns from its own steps: closed forms, signs, and rising rewards on both tiny pipelines."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import SGD

from latentreward.alignment import (
    Branching,
    ClippedPolicyLoss,
    GroupAdvantage,
    Policy,
    PolicySource,
    Reward,
    Sampling,
    StepwiseGRPOModule,
    TrajectoryGRPOModule,
)
from latentreward.core.contracts import PromptBatch, StepSamples
from latentreward.diffusion import LoRA
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.marks import rotated_after
from tests.tiny_pipelines import source_of

PROMPTS = ["a red circle on a black background", "two blue squares on a white background", "a large green cross"]
BATCH = PromptBatch(tuple(PROMPTS[:2]), ("0/0", "0/1"))


def source(name: str) -> PolicySource:
    return PolicySource(source_of(name), lora=LoRA(rank=4, alpha=4))


def stepwise(name: str = "sd15", scale: float = 10.0, **options) -> StepwiseGRPOModule:
    settings = {
        "sampling": Sampling(num_inference_steps=4),
        "candidates": Branching(3),
        "guidance_scale": 2.0,
        "seed": 1,
    }
    module = StepwiseGRPOModule(source(name), FirstChannelReward(scale), **{**settings, **options})
    return attached(module)


class DifferentiableChannel(FirstChannelReward):
    def load(self, policy: Policy) -> Reward:
        reward = super().load(policy)
        reward.differentiable = True
        return reward


def trajectory(
    name: str = "sd15", scale: float = 10.0, source_of_reward=FirstChannelReward, **options
) -> TrajectoryGRPOModule:
    settings = {"sampling": Sampling(4), "num_trajectories": 3, "guidance_scale": 2.0, "seed": 1}
    module = TrajectoryGRPOModule(source(name), source_of_reward(scale), **{**settings, **options})
    return attached(module)


def attached(module):
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.log = module.log_dict = lambda *args, **options: None
    return module


@pytest.mark.parametrize("name", ["sd15", "sd35_tiny"])
@pytest.mark.parametrize("make", rotated_after(1, [trajectory, stepwise]))
def test_the_first_step_is_taken_on_policy(make, name: str) -> None:
    """Without a change of the policy, ratios are 1: the loss is the mean advantage, negated, which is 0 per group."""
    module = make(name)
    samples = module.roll_out(BATCH)
    log_prob = module.transition(samples).log_prob(samples.next_latents.transpose(0, 1)).T
    torch.testing.assert_close(log_prob, samples.log_prob, atol=1e-5, rtol=1e-5)
    loss = module.training_step(samples, 0)
    assert loss.item() == pytest.approx(-samples.advantage.mean().item(), abs=1e-4)


def test_stepwise_advantages_are_those_of_the_scores_of_one_state() -> None:
    module = stepwise()
    samples = module.roll_out(BATCH)
    assert samples.next_latents.shape[:2] == (8, 3)
    scores = 10 * samples.next_latents[:, :, 0].flatten(2).mean(dim=2).double()
    spread = scores.std(dim=1, correction=0, keepdim=True) + 1e-4
    expected = ((scores - scores.mean(dim=1, keepdim=True)) / spread).float()
    torch.testing.assert_close(samples.advantage, expected, atol=1e-3, rtol=1e-3)  # scores of the last step lie close
    statistics = module.rollout_statistics
    assert statistics.timesteps.tolist() == samples.timesteps[::2].tolist()
    torch.testing.assert_close(statistics.scores.permute(0, 2, 1).flatten(0, 1), scores.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("global_std", rotated_after(1, [True, False]))
def test_trajectory_advantages_are_those_of_the_finished_latents(global_std: bool) -> None:
    module = trajectory(advantage=GroupAdvantage("all" if global_std else "group"))
    samples = module.roll_out(BATCH)
    last = samples.next_latents[samples.timesteps == samples.timesteps.min()][:, 0]
    rewards = 10 * last[:, 0].flatten(1).mean(dim=1).double().view(2, 3)
    spread = rewards.std(correction=0) if global_std else rewards.std(dim=1, correction=0, keepdim=True)
    expected = ((rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)).float().flatten()
    steps = len(samples) // 6
    torch.testing.assert_close(samples.advantage[:, 0], expected.repeat(steps), atol=1e-5, rtol=1e-5)


def test_each_trajectory_is_one_chain_from_noise_of_its_own() -> None:
    samples = trajectory().roll_out(BATCH)
    states = samples.latents.unflatten(0, (-1, 6))
    following = samples.next_latents[:, 0].unflatten(0, (-1, 6))
    assert torch.equal(states[1:], following[:-1])
    assert len({row.sum().item() for row in states[0]}) == 6


def test_gradient_is_that_of_the_policy_gradient() -> None:
    """At ratio 1 the gradient is −mean(A ∇ log p), with K candidates of a state in one evaluation or in K."""
    module = stepwise()
    samples = module.roll_out(BATCH)
    parameters = [p for p in module.parameters() if p.requires_grad]
    ours = torch.autograd.grad(module.training_step(samples, 0), parameters)
    total = 0
    for place in range(3):
        one = StepSamples(**{**vars(samples), "next_latents": samples.next_latents[:, place : place + 1]})
        log_prob = module.transition(one).log_prob(one.next_latents[:, 0])
        total = total - (samples.advantage[:, place] * log_prob).mean() / 3
    theirs = torch.autograd.grad(total, parameters)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_kl_is_zero_at_the_reference_and_pulls_back_to_it() -> None:
    module = stepwise(loss=ClippedPolicyLoss(kl_weight=1.0))
    samples = module.roll_out(BATCH)
    calm = StepSamples(**{**vars(samples), "advantage": torch.zeros_like(samples.advantage)})
    assert module.training_step(calm, 0).item() == 0.0
    weights = [p for p in module.parameters() if p.requires_grad]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.05 * torch.randn_like(weight))
    away = module.training_step(calm, 0)
    away.backward()
    SGD(weights, 1e-3).step()
    with torch.no_grad():
        assert 0 < module.training_step(calm, 0) < away


def test_only_steps_of_the_window_are_learned_from() -> None:
    samples = trajectory(low=400, high=800).roll_out(BATCH)
    assert samples.timesteps.unique().tolist() == [501, 751]
