"""What pruning keeps, how good its predictions are, and what selection does to advantages, by simulation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    Agreement,
    BestAndWorst,
    DGPOLoss,
    GroupAdvantage,
    PromptedPolicy,
    PruningRule,
    RolloutDraws,
    Sampling,
    sample_pruned,
    sample_trajectories,
    scaled_advantages,
)
from tests.alignment.rollout.tiny_rollout import PROMPTS, NetworkRows, tiny_policy
from tests.marks import slow_after

NONE = torch.Generator()


def kept(predicted: Tensor, count: int, rule: PruningRule | None = None) -> Tensor:
    return torch.stack([(rule or BestAndWorst()).choose(one, count, NONE) for one in predicted])


@pytest.mark.parametrize(("count", "expected"), [(2, {1, 3}), (3, {1, 3, 4}), (4, {0, 1, 3, 4}), (6, set(range(6)))])
def test_best_and_worst(count: int, expected: set[int]) -> None:
    """Of an odd number, one more from above."""
    assert set(BestAndWorst().choose(torch.tensor([1.0, 0.0, 2.0, 9.0, 8.0, 3.0]), count, NONE).tolist()) == expected


def simulated(rho: float, prompts: int = 1500, candidates: int = 24) -> tuple[Tensor, Tensor]:
    """Predictions and rewards with a correlation within prompts, whose means differ."""
    drawn = torch.randn(3, prompts, candidates, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    predicted = 3 * drawn[0] + 10 * drawn[2, :, :1]
    return predicted, 0.5 * (rho * drawn[0] + (1 - rho**2) ** 0.5 * drawn[1]) - 4 * drawn[2, :, :1]


@pytest.mark.parametrize("count", [6, 12, 24])
@pytest.mark.parametrize("rho", [0.0, 0.5, -0.9])
def test_correlation_is_that_of_all_candidates(rho: float, count: int) -> None:
    predicted, rewards = simulated(rho)
    chosen = kept(predicted, count)
    agreement = Agreement.of(predicted, chosen, rewards.gather(1, chosen))
    assert agreement.spread.item() == pytest.approx({6: 3.16, 12: 1.90, 24: 1.0}[count], abs=0.02)
    assert agreement.correlation.item() == pytest.approx(rho, abs=0.02)
    variance = rewards.gather(1, chosen).var(dim=1).mean() / rewards.var(dim=1).mean()
    assert agreement.contrast.item() == pytest.approx(variance.item(), rel=0.03)


def test_agreement_of_two_prompts_by_hand() -> None:
    """The kept have variance 8, all have 10 / 3; rewards are the predictions, and noise of variance 2 beside these."""
    predicted = torch.tensor([[0.0, 1.0, 3.0, 4.0]]).expand(2, 4)
    agreement = Agreement.of(predicted, torch.tensor([[0, 3]] * 2), torch.tensor([[-1.0, 5.0], [1.0, 3.0]]))
    assert agreement.spread.item() == pytest.approx(8 / (10 / 3))
    assert agreement.correlation.item() ** 2 == pytest.approx((10 / 3) / (10 / 3 + 2))


@pytest.mark.parametrize(("rho", "prompts", "count"), [(0.0, 1, 2), (0.0, 4, 8), (0.7, 4, 8)])
def test_few_samples_do_not_raise_the_contrast(rho: float, prompts: int, count: int) -> None:
    """On average of many rollouts of few prompts, where correlations are high by chance."""
    predicted, rewards = simulated(rho, prompts=400 * prompts)
    chosen = kept(predicted, count)
    own = rewards.gather(1, chosen)
    parts = [slice(at, at + prompts) for at in range(0, len(own), prompts)]
    found = torch.stack([Agreement.of(predicted[at], chosen[at], own[at]).contrast for at in parts])
    wanted = Agreement.of(predicted, chosen, own).contrast.item()
    assert found.mean().item() == pytest.approx(wanted, rel=0.12)
    assert (found >= 1).all() and found.isfinite().all()


@pytest.mark.parametrize("std", ["group", "all", "none"])
def test_the_gradient_is_as_large_as_without_pruning(std: Any) -> None:
    """The mean of advantage times reward is that of 12 random samples; without scaling it is larger."""
    predicted, rewards = simulated(0.9, prompts=300)
    chosen = kept(predicted, 12)
    own, rule = rewards.gather(1, chosen), GroupAdvantage(std)
    contrast = Agreement.of(predicted, chosen, own).contrast
    sizes = [
        (scaled_advantages(rule, of, scale) * of).mean().item()
        for of, scale in ((rewards[:, :12], None), (own, contrast), (own, None))
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.08)
    assert sizes[2] == pytest.approx(sizes[0] * contrast.item() ** (0.5 if std == "group" else 1), rel=0.08)


@pytest.mark.parametrize("slope", [-0.02, 0.005])
def test_dgpo_weighs_groups_as_without_pruning(slope: float) -> None:
    """Errors fall, or rise, with the reward since the reference; without scaling w is further from ½."""
    predicted, rewards = simulated(0.9, prompts=300)
    chosen, reference = kept(predicted, 12), torch.full_like(rewards, 0.5)
    own, contrast = rewards.gather(1, chosen), Agreement.of(predicted, chosen, rewards.gather(1, chosen)).contrast
    errors, found = reference + slope * (rewards - rewards.mean(dim=1, keepdim=True)), []
    for of, error, scale in (
        (rewards[:, :12], errors[:, :12], None),
        *((own, errors.gather(1, chosen), scale) for scale in (contrast, None)),
    ):
        velocity = error.sqrt().reshape(-1, 1).requires_grad_()
        advantage = scaled_advantages(GroupAdvantage("all"), of, scale)
        zeros, held = torch.zeros_like(velocity), reference[:, :12].sqrt().reshape(-1, 1)
        result = DGPOLoss(clip_range=None, kl_weight=0.0)(velocity, None, zeros, advantage, held)
        (gradient,) = torch.autograd.grad(result.loss, velocity)
        found.append((result.weight.mean().item(), ((gradient / velocity).view_as(of) * of).sum().item()))
    assert found[1] == pytest.approx(found[0], rel=0.08)
    assert found[2] != pytest.approx(found[0], rel=0.08)


@pytest.mark.parametrize("name", slow_after(1, ["sd35_tiny", "sd_tiny"]))
def test_kept_trajectories_are_those_of_a_whole_sampling(name: str) -> None:
    """Noise and log-probabilities too; the network sees all samples up to the step, the kept ones after it."""
    policy, steps = tiny_policy(name), Sampling(5).with_noise()
    sampler, asked = steps.sampler(policy.family), []

    def keep(states: Tensor, timestep: float) -> Tensor:
        asked.append((states, timestep))
        return torch.tensor([0, 2])

    whole = sample_trajectories(policy, sampler, PROMPTS, steps, 1.0, 3, kept="means")
    network, draws = PromptedPolicy.of(policy, PROMPTS, 1.0), RolloutDraws(3, PROMPTS.keys)
    with NetworkRows(policy) as calls:
        taken, rows = sample_pruned(network, sampler, steps, draws, {2: keep}, "means")
    assert [rows for rows, _ in calls] == [3, 3, 2, 2, 2]
    assert rows.tolist() == [0, 2]
    assert asked[0][1] == sampler.timesteps[2].item()
    torch.testing.assert_close(asked[0][0], whole.latents[2])
    several = {0: lambda *_: torch.tensor([2, 0, 1]), 2: lambda *_: torch.tensor([1, 0])}
    turned, order = sample_pruned(network, sampler, steps, draws, several, "means")
    assert order.tolist() == [0, 2]
    for found in (taken, turned):
        for field in ("latents", "log_prob", "means"):
            torch.testing.assert_close(getattr(found, field), getattr(whole, field)[:, [0, 2]], rtol=1e-4, atol=1e-4)


def test_keeping_all_is_a_whole_sampling_to_the_bit() -> None:
    policy, steps = tiny_policy("sd35_tiny"), Sampling(4).with_noise()
    sampler = steps.sampler(policy.family)
    whole = sample_trajectories(policy, sampler, PROMPTS, steps, 1.0, 3)
    network, draws = PromptedPolicy.of(policy, PROMPTS, 1.0), RolloutDraws(3, PROMPTS.keys)
    taken, _ = sample_pruned(network, sampler, steps, draws, {1: lambda *_: torch.arange(3)})
    assert torch.equal(taken.latents, whole.latents) and torch.equal(taken.log_prob, whole.log_prob)
    assert torch.equal(taken.latents[0], RolloutDraws(3, PROMPTS.keys).initial(policy.latent_shape()))
