"""Trust regions: closed forms, and what they leave alone."""

import pytest
import torch

from latentreward.alignment import (
    ClippedPolicyLoss,
    FlowDPPO,
    GRPOGuard,
    NormGuard,
    RankGate,
    StepDrift,
    held_weights,
)

SHAPE = (6, 4, 3, 3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drift_of(mean: torch.Tensor, old_mean: torch.Tensor) -> StepDrift:
    spread = torch.linspace(0.5, 1.0, len(mean))
    return StepDrift.between(mean, old_mean, spread * 0.3, spread)


def test_the_guard_cancels_the_quadratic_term() -> None:
    """With x' = μ_old + s̄·z, log ρ is exactly ⟨z·(μ − μ_old)⟩, whatever the size of the step."""
    mean, old_mean, noise = (normal(*SHAPE, seed=seed).double() for seed in (0, 1, 2))
    std = torch.full((6,), 0.4, dtype=torch.float64)
    following = old_mean + 0.4 * noise

    def log_prob(mu: torch.Tensor) -> torch.Tensor:
        return -((following - mu) ** 2).flatten(1).mean(dim=1) / (2 * 0.4**2)

    drift = StepDrift.between(mean, old_mean, std, std)
    ratio = GRPOGuard(per_step=True).objective(log_prob(mean) - log_prob(old_mean), std, 1e-4, drift)[1]
    torch.testing.assert_close(ratio.log(), (noise * (mean - old_mean)).flatten(1).mean(dim=1))


def test_dppo_leaves_out_a_step_that_has_moved_too_far_and_would_move_further() -> None:
    old_mean = normal(*SHAPE)
    far = torch.tensor([True, True, True, False, False, True]).view(-1, 1, 1, 1)
    mean = torch.where(far, old_mean + 1.0, old_mean)
    log_ratio = torch.tensor([0.5, -0.5, -0.5, 0.5, -0.5, 2000.0]).requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    rows, _, left_out = FlowDPPO(1e-3).objective(log_ratio, advantage, 1e-4, drift_of(mean, old_mean))
    assert left_out.tolist() == [True, False, True, False, False, True]
    (slope,) = torch.autograd.grad(rows.sum(), log_ratio)
    assert slope.isfinite().all()
    assert (slope == 0).tolist() == left_out.tolist()


def test_norm_guard_acts_on_predictions_above_the_reference_alone() -> None:
    reference = normal(*SHAPE)
    scale = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.0, 1.0]).view(-1, 1, 1, 1)
    prediction = (scale * reference).requires_grad_()
    value = NormGuard(3.0).penalty(prediction, reference)
    assert value.item() == pytest.approx(3.0 * (0.25 + 1.0) / 6, rel=1e-4)
    (slope,) = torch.autograd.grad(value, prediction)
    graph = reference.clone().requires_grad_()
    assert not NormGuard().penalty(prediction.detach(), graph).requires_grad
    assert slope.isfinite().all()
    assert (slope.flatten(1).norm(dim=1) > 1e-6).tolist() == [False, False, True, True, False, False]


def test_the_rank_gate_opens_where_rewards_disagree_and_continues_from_a_checkpoint() -> None:
    main = torch.arange(40.0)
    others = torch.stack([main, main], dim=1)
    others[3], others[36] = 100.0, -100.0
    rewards = torch.cat([main[:, None], others], dim=1)[None]
    released, reverse = RankGate(), RankGate(reversed=True)
    assert released.opens(rewards)[0, 3]
    assert reverse.opens(rewards)[0, 36]
    assert not released.opens(rewards)[0, 36]
    again = RankGate()
    again.restore(released.state())
    assert torch.equal(again.opens(rewards), released.opens(rewards))
    assert again.state() == released.state()


def test_the_share_of_the_rank_gate_follows_the_last_20_rollouts() -> None:
    def rollout(reversed_rows: int) -> torch.Tensor:
        main, other = torch.arange(8.0), torch.arange(8.0)
        other[:reversed_rows] = main[:reversed_rows].flip(0)
        return torch.stack([main, other], dim=1)[None]

    def shares(gate: RankGate, *rollouts: int) -> list[float]:
        return [(gate.opens(rollout(rows)), gate.share)[1] for rows in rollouts]

    gate = RankGate()  # mean u: 1.8 with 6 rows reversed, 4 with 8, 2/3 with 4
    assert shares(gate, 6, 8, 8, 4) == pytest.approx([0.1, 0.11, 0.11, 0.099])
    assert shares(gate, *[6] * 20, 8)[-2:] == pytest.approx([0.099, 0.1089])  # the earlier 4 is forgotten
    assert shares(RankGate(0.2), 6, 8) == [0.2, 0.2]
    assert shares(RankGate(0.02), 6, 4) == [0.02, 0.02]


def test_equal_rewards_share_a_rank() -> None:
    others = torch.tensor([1.0, 0.0, 0.0, 0.0])
    found = RankGate().uncertainty(torch.stack([torch.tensor([1.0, 1.0, 0.0, 0.0]), others], dim=1))
    assert found.tolist() == [0.5, -1.5, 0.5, 0.5]


def test_the_divergence_acts_on_held_rows_alone_and_is_0_without_any() -> None:
    log_prob, kl = 0.01 * normal(6), normal(6, seed=1).square()
    loss = ClippedPolicyLoss(kl_weight=0.5)
    held = torch.tensor([True, False, False, True, False, False])
    some = loss(log_prob, log_prob, torch.zeros(6), kl, kl_weights=held_weights(held))
    assert some.loss.item() == pytest.approx(0.5 * kl[held].mean().item())
    assert loss(log_prob, log_prob, torch.zeros(6), kl, kl_weights=held_weights(~held & held)).loss.item() == 0.0


def test_the_mean_over_ranks_of_the_divergence_is_that_over_all_held_rows() -> None:
    kl, held = normal(6, seed=1).square(), torch.tensor([True, False, False, True, True, False])
    loss = ClippedPolicyLoss(kl_weight=1.0)
    every = held.view(2, 3)
    of_ranks = [
        loss(*[torch.zeros(3)] * 3, kl[rows], kl_weights=held_weights(held[rows], every)).kl
        for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(of_ranks) / 2, kl[held].mean())
