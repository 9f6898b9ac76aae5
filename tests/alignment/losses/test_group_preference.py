"""DGPO's and CRD's losses: closed forms, gradients by finite differences, their relation to AWM."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentreward.alignment import CRDLoss, DGPOLoss, MatchingLoss

SHAPE = (6, 2, 3, 3)
"""Two groups of three."""


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE, OLD, TARGET, VELOCITY = drawn(1), drawn(2), drawn(3), drawn(4)
ADVANTAGE = torch.tensor([[1.5, -0.5, 0.0], [2.0, -1.5, 0.25]], dtype=torch.float64)


def test_dgpo_of_one_element() -> None:
    """d = 4, d_ref = 1, so that s = 1/2 · (2 · 3 − 1 · 3) and the policy's term 1/2 · w · (2 · 4 − 4)."""
    one = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    result = DGPOLoss(1.0, 0.5, None)(3 * one, None, one, torch.tensor([[2.0, -1.0]]), 2 * one)
    weight = torch.sigmoid(torch.tensor(1.5, dtype=torch.float64))
    assert result.weight.item() == pytest.approx(weight.item())
    assert result.policy.item() == pytest.approx(2 * weight.item())
    assert result.loss.item() == pytest.approx(2 * weight.item() + 0.5)


def test_dgpo_without_beta_has_half_the_gradient_of_uniform_awm() -> None:
    slopes = []
    awm = MatchingLoss("uniform", kl_weight=0.0, average_weight=0.0, scale_to=None)
    for loss in (DGPOLoss(0.0, 0.0, None), None):
        velocity = VELOCITY.clone().requires_grad_()
        if loss is None:
            log_prob = awm.log_prob(velocity, TARGET, torch.ones(6))
            awm(log_prob, log_prob.detach(), ADVANTAGE.flatten()).loss.backward()
        else:
            loss(velocity, None, TARGET, ADVANTAGE, REFERENCE).loss.backward()
        slopes.append(velocity.grad)
    torch.testing.assert_close(slopes[0], slopes[1] / 2, rtol=1e-6, atol=1e-9)


def test_dgpo_weighs_a_group_by_what_the_policy_already_prefers() -> None:
    """A policy that denoises the better samples better than the reference gives its group less weight."""
    away = TARGET + torch.where(ADVANTAGE.flatten() > 0, 0.1, 2.0).view(-1, 1, 1, 1)
    done, open_ = (DGPOLoss(10.0)(one, OLD, TARGET, ADVANTAGE, TARGET + 1).weight for one in (away, TARGET + 1))
    assert (done < 0.01).all()
    assert (open_ == 0.5).all()


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
    free = DGPOLoss(kl_weight=0.0, clip_range=None)(velocity, None, TARGET, torch.full((2, 3), advantage), REFERENCE)
    assert result.loss.item() == free.loss.item()


def test_crd_of_one_element() -> None:
    """r = (1, 1/2), ρ = (5 − 1, 2 − 4), both less their means: (3 − 1/4)² for each sample, times c."""
    target = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    velocity, old = torch.tensor([1.0, 4.0]).view_as(target), torch.tensor([5.0, 2.0]).view_as(target)
    result = CRDLoss()(velocity, old, target, torch.tensor([[5.0, 0.0]]), velocity)
    assert result.implicit.tolist() == [[4.0, -2.0]]
    assert result.policy.item() == pytest.approx(5 * 2.75**2)
    assert result.kl.item() == 0.0


def test_crd_ignores_what_a_prompts_samples_share() -> None:
    """Neither a shift of a prompt's advantages nor of its errors under the old policy changes the loss."""
    loss = CRDLoss(adaptive=False)
    want = loss(VELOCITY, OLD, TARGET, ADVANTAGE, VELOCITY)
    shifted = loss(VELOCITY, OLD, TARGET, ADVANTAGE + torch.tensor([[0.5], [-1.0]]), VELOCITY)
    torch.testing.assert_close(shifted.rows, want.rows)
    whole = CRDLoss(adaptive=False)(VELOCITY, OLD, TARGET, ADVANTAGE.view(1, 6), VELOCITY)
    assert not torch.allclose(whole.rows.view(2, 3), want.rows)


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


def slope_along(value: Callable[[Tensor], Tensor], direction: Tensor) -> Tensor:
    step = 1e-5
    return (value(VELOCITY + step * direction) - value(VELOCITY - step * direction)) / (2 * step)


def distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().flatten(1).mean(dim=1).view(2, 3)


@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("form", ["mse", "bce"])
def test_gradient_of_crd_by_finite_differences(form: str, temperature: float | None) -> None:
    """The means of implicit rewards have no gradient."""
    loss = CRDLoss(2.0, 0.1, temperature=temperature, form=form, adaptive=False)
    velocity, share = VELOCITY.clone().requires_grad_(), 0.5 + ADVANTAGE / 10
    loss(velocity, OLD, TARGET, ADVANTAGE, REFERENCE).loss.backward()
    sides = [1.0, -1.0] if temperature else [0.0]
    means = [(sign * share / (temperature or 1.0)).softmax(dim=1) for sign in sides]
    kept = [(one * (distance(OLD, TARGET) - distance(VELOCITY, TARGET))).sum(dim=1, keepdim=True) for one in means]

    def held(one: Tensor) -> Tensor:
        implicit, rows = distance(OLD, TARGET) - distance(one, TARGET), torch.zeros(2, 3, dtype=torch.float64)
        for weights, mean in zip(means, kept, strict=True):
            logits, wanted = 2 * (implicit - mean), share - (weights * share).sum(dim=1, keepdim=True)
            chance = wanted.sigmoid()
            entropy = -chance * logits.sigmoid().log() - (1 - chance) * (-logits).sigmoid().log()
            rows += ((logits - wanted) ** 2 if form == "mse" else entropy) / len(means)
        return (5 / 2 * rows + 0.1 * distance(one, REFERENCE)).mean()

    torch.testing.assert_close((velocity.grad * drawn(5)).sum(), slope_along(held, drawn(5)), rtol=1e-6, atol=1e-9)
