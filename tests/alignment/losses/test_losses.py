"""What golden cases do not hold of the losses: limits, signs, precision, and what gets no gradient."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    ClippedPolicyLoss,
    CRDLoss,
    DGPOLoss,
    MatchingLoss,
    NFTLoss,
    OutcomeProcessLoss,
    RewardLoss,
    StepDPO,
    directed_target,
    gaussian_step_kl,
    implicit_rewards,
    reward_ascent,
    velocity_divergence,
)
from latentreward.alignment.losses.matching import matching_log_prob
from latentreward.alignment.losses.nft import optimality
from latentreward.core.contracts import PairScores
from latentreward.reward import BradleyTerryLoss
from tests.oracles import alignment_losses as oracle

SHAPE = (6, 2, 3, 3)
"""Two groups of three."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE, OLD, TARGET, VELOCITY = drawn(1), drawn(2), drawn(3), drawn(4)
ADVANTAGE = torch.tensor([[1.5, -0.5, 0.0], [2.0, -1.5, 0.25]], dtype=torch.float64)


# steps of a sampler


def test_the_clipped_policy_by_hand() -> None:
    """Rows max(−Aρ, −A·clamp(ρ, 0.9, 1.1)) with ρ and A of the comments, plus half the mean divergence of 2."""
    ratio = torch.tensor([1.2, 1.05, 0.7, 0.7], dtype=torch.float64)
    log_prob, kl = ratio.log().requires_grad_(), torch.tensor([1.0, 2.0, 3.0, 2.0], requires_grad=True)
    old, advantage = torch.zeros(4), torch.tensor([2.0, 9.0, 1.0, -3.0])  # 9 is held at 5
    loss = ClippedPolicyLoss(0.1, kl_weight=0.5)
    result = loss(log_prob, old, advantage, kl)
    rows = [-2.2, -5.25, -0.7, 2.7]
    policy = sum(rows) / 4
    assert [part.item() for part in result] == pytest.approx([policy + 1, policy, 2, 0.75, 0.9125])
    result.loss.backward()
    assert log_prob.grad.tolist() == pytest.approx([0, -5.25 / 4, -0.7 / 4, 0])  # the first and last rows are clipped
    assert kl.grad.tolist() == [0.125] * 4
    weighted = loss(log_prob, old, advantage, kl, torch.tensor([1.0, 2.0, 1.0, 0.0]))
    assert weighted.loss.item() == pytest.approx(2.25 * (-2.2 - 10.5 - 0.7) / 4 + 1)
    assert ClippedPolicyLoss(0.1, max_advantage=None)(log_prob, old, advantage).loss.item() == pytest.approx(
        (-2.2 - 9.45 - 0.7 + 2.7) / 4
    )
    with pytest.raises(ValueError, match="needs kl"):
        loss(log_prob, old, advantage)


def test_a_step_past_the_range_teaches_no_more_but_one_in_the_wrong_direction_does() -> None:
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    result = ClippedPolicyLoss(0.1)(log_prob, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    result.loss.backward()
    assert (log_prob.grad == 0).tolist() == [True, False, False, True]
    assert result.clipped == 1


def test_kl_is_that_of_two_gaussians() -> None:
    mean, reference, spread = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.5, 1.0, 2.0])
    normals = [torch.distributions.Normal(one, spread.view(3, 1, 1, 1)) for one in (mean, reference)]
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(dim=1)
    torch.testing.assert_close(gaussian_step_kl(mean, reference, spread), expected)


def test_two_advantages_are_clipped_apart_and_the_divergence_counts_once() -> None:
    log_prob, old, outcome, process = (drawn(seed, 16) for seed in range(4))
    both, one, kl = OutcomeProcessLoss(0.1), ClippedPolicyLoss(0.1), torch.full((16,), 2.0, requires_grad=True)
    plain = both(log_prob, old, outcome, process).loss
    torch.testing.assert_close(plain, one(log_prob, old, outcome).loss + one(log_prob, old, process).loss)
    assert abs(plain - one(log_prob, old, outcome + process).loss) > 0.1
    held = OutcomeProcessLoss(0.1, kl_weight=0.5)(log_prob, old, outcome, process, kl).loss
    torch.testing.assert_close(held - plain, torch.tensor(1.0))
    held.backward()
    torch.testing.assert_close(kl.grad, torch.full((16,), 0.5 / 16))


def test_a_pair_of_steps_clamped_on_both_sides_has_a_finite_loss_and_no_gradient() -> None:
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    result = StepDPO()(chosen, rejected, torch.zeros(1), torch.zeros(1))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(100.335, abs=1e-3)
    assert chosen.grad == rejected.grad == 0 and result.clamped == 1


def test_small_ratios_survive_float32_and_autocast() -> None:
    reference = drawn(0, 2, 7)
    columns = [column.float() for column in (*(reference + 1e-4 * drawn(1, 2, 7)), *reference)]
    plain = StepDPO()(*columns).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain, StepDPO()(*columns).loss)
    assert plain.item() == pytest.approx(oracle.step_dpo(torch.stack(columns, 1).double().numpy(), 500.0, 0.1))


def test_small_changes_of_denoising_errors_survive_float32() -> None:
    target, reference = torch.randn(2, 2, 4, 32, 32)
    prediction = reference + 1e-6 * torch.randn_like(reference)
    errors = [(one.double() - target.double()).square().flatten(1).mean(dim=1) for one in (prediction, reference)]
    found = implicit_rewards(prediction, reference, target).double()
    torch.testing.assert_close(found, -2500 * (errors[0] - errors[1]), rtol=2e-2, atol=0)


@pytest.mark.parametrize("spread", [1e-3, 0.1])
@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 3, 3, 3)], ids=["image", "video"])
def test_diffusion_dpo_and_its_slopes(spread: float, shape: tuple[int, ...]) -> None:
    """Against the formula in numpy, and its central differences in one element of a better and of a worse image."""
    arrays = [drawn(seed, 6, *shape).float().double().numpy() for seed in range(3)]
    prediction = arrays[0] = (arrays[1] + spread * arrays[0]).astype("float32").astype("float64")
    policy, reference, target = (torch.from_numpy(one).float().requires_grad_(one is prediction) for one in arrays)
    chosen, rejected = implicit_rewards(policy, reference, target, 2000.0).chunk(2)
    ones = torch.ones(3)
    loss = BradleyTerryLoss()(PairScores(chosen, rejected, ones, ones, ones, ones))
    loss.backward()
    assert loss.item() == pytest.approx(oracle.diffusion_dpo(*arrays, 2000.0), rel=1e-4)
    for row in (1, 4):
        place, values = (row, *(0 for _ in shape)), []
        for step in (1e-6, -1e-6):
            moved = prediction.copy()
            moved[place] += step
            values.append(oracle.diffusion_dpo(moved, *arrays[1:], 2000.0))
        assert policy.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("settings", "loss", "slopes"),
    [
        ({}, -1.5, [-0.5, -0.5]),
        ({"scale": 0.1}, -0.15, [-0.05, -0.05]),
        ({"ceiling": 2.0, "scale": 0.1}, 0.1 * (2 + 0) / 2, [-0.05, 0.0]),  # rewards 0 and 3: 3 lies above the ceiling
        ({"ceiling": 2.0, "sigmoid": True}, (4 - 0.5 - 1 / (1 + math.exp(-3))) / 2, [-0.125, -0.022588]),
    ],
)
def test_loss_of_rewards(settings: Any, loss: float, slopes: list[float]) -> None:
    rewards = torch.tensor([0.0, 3.0], requires_grad=True)
    found = RewardLoss(**settings)(rewards)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert rewards.grad.tolist() == pytest.approx(slopes, rel=1e-4)


# finished samples, noised again


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ("all", [0.0, 0.4, 0.5, 0.6, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.6, 1.0]),
        ("negative_only", [0.0, 0.4, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_optimality_is_linear_in_the_advantage_and_clipped(signs: Any, expected: list[float]) -> None:
    found = optimality(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), max_advantage=5.0, signs=signs)
    assert found.tolist() == pytest.approx(expected)


def test_good_samples_pull_the_velocity_to_the_target_and_bad_ones_push_it_away() -> None:
    """At v = v_old the gradient is that of (u − v⁺)² alone for r = 1, of (u − v⁻)² for r = 0: equal and opposite."""
    slopes, one = [], torch.ones(1, 1, 1, 1)
    for advantage in (5.0, -5.0):
        velocity, loss = one.clone().requires_grad_(), NFTLoss(kl_weight=0, space="velocity")
        loss(velocity, one, 0 * one, torch.tensor([0.5]), torch.tensor([advantage])).loss.backward()
        slopes.append(velocity.grad.item())
    assert slopes == pytest.approx([2.0, -2.0])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("uniform", -4.0), ("t", -4 * 0.3), ("t2", -4 * 0.09), ("huber", -(2 - 1e-5) * 0.3)],
)
def test_log_prob_is_the_weighted_error(weighting: Any, expected: float) -> None:
    target, sigma = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0.3])
    assert matching_log_prob(target + 2, target, sigma, weighting).item() == pytest.approx(expected)
    variance = 0.49 * 0.3 / 0.7
    assert velocity_divergence(target + 2, target, sigma, "elbo").item() == pytest.approx(4 / (2 * variance))
    near_one = velocity_divergence(target + 2, target, torch.tensor([1.0]), "elbo").item()
    assert near_one == pytest.approx(4 * 0.01 / (2 * 0.49))  # σ of 0.99 in 1 − σ


def test_dgpo_without_beta_has_half_the_gradient_of_uniform_awm() -> None:
    awm = MatchingLoss("uniform", kl_weight=0.0, average_weight=0.0, scale_to=None)
    first, second = (VELOCITY.clone().requires_grad_() for _ in range(2))
    DGPOLoss(0.0, 0.0, None)(first, None, TARGET, ADVANTAGE, REFERENCE).loss.backward()
    log_prob = awm.log_prob(second, TARGET, torch.ones(6))
    awm(log_prob, log_prob.detach(), ADVANTAGE.flatten()).loss.backward()
    torch.testing.assert_close(first.grad, second.grad / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("further", [True, False])
def test_dgpo_cuts_samples_that_have_moved_with_their_advantage(advantage: float, further: bool) -> None:
    """A good sample that is denoised better than by the old policy, or a bad one that is denoised worse."""
    velocity = (TARGET + 1).requires_grad_()
    old = TARGET + (1.1 if (advantage > 0) == further else 0.9)
    result = DGPOLoss(kl_weight=0.0)(velocity, old, TARGET, torch.full((2, 3), advantage), REFERENCE)
    result.loss.backward()
    assert result.clipped.all() == result.clipped.any() == further
    assert bool(velocity.grad.any()) == (not further)


def test_crd_holds_good_samples_at_least_as_hard_as_bad_ones() -> None:
    velocity, reference = torch.zeros(3, 1), torch.ones(3, 1)
    loss, advantage = CRDLoss(kl_weight=1e-5), torch.tensor([[-9.0, 0.0, 9.0]])
    assert loss(velocity, velocity, velocity, advantage, reference).kl == 1.0


def test_crd_is_at_rest_where_implicit_rewards_are_the_advantages() -> None:
    """d / w of a constant error e is e, so that e = e_old − r / β fits exactly."""
    base, advantage = torch.zeros(SHAPE, dtype=torch.float64), ADVANTAGE.flatten().view(-1, 1, 1, 1)
    velocity = (base + 3 - (0.5 + advantage / 10) / 2).requires_grad_()
    result = CRDLoss(beta=2.0)(velocity, base + 3, base, ADVANTAGE, velocity.detach())
    result.loss.backward()
    assert result.rows.abs().max() < 1e-20
    assert velocity.grad.abs().max() < 1e-9


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.0, 50.0])
def test_no_target_of_a_climb_lies_beyond_the_radius(rate: float) -> None:
    radius = torch.tensor([0.1, 0.5, 2.0, 0.1, 0.5, 2.0], dtype=torch.float64)
    for end in reward_ascent(TARGET, torch.cos, radius, 3, rate):
        found = (end - TARGET).flatten(1).norm(dim=1)
        assert (found <= radius * (1 + 1e-12)).all() and (found > 0.29 * radius).all()
    assert all(torch.equal(end, TARGET) for end in reward_ascent(TARGET, torch.zeros_like, radius))


def test_weights_of_a_direction_keep_their_digits_beside_outputs_of_16_bits() -> None:
    rows = torch.ones(1, 1, dtype=torch.bfloat16)
    assert directed_target(rows * 0, rows, torch.tensor([123.45])).item() == pytest.approx(123.45)
