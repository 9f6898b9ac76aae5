"""RAM's loss: closed forms, the gradient by finite differences, and its relation to AWM."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import MatchingLoss, RAMLoss, directed_target

SHAPE = (4, 2, 3, 3)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE, OLD, TRUE = drawn(1), drawn(2), drawn(3)
ADVANTAGE = torch.tensor([1.5, -0.5, 0.0, 2.0], dtype=torch.float64)


def test_target_of_one_element() -> None:
    """3 + 10 · 0.5 · (7 − 6)."""
    one = torch.ones(1, 1, 1, 1)
    assert RAMLoss(10.0).target(3 * one, 6 * one, 7 * one, torch.tensor([0.5])).item() == 8.0


@pytest.mark.parametrize(("multiplier", "advantage"), [(0.0, ADVANTAGE), (10.0, torch.zeros(4, dtype=torch.float64))])
def test_without_a_reward_the_reference_is_the_target(multiplier: float, advantage: Tensor) -> None:
    loss = RAMLoss(multiplier)
    assert torch.equal(loss.target(REFERENCE, OLD, TRUE, advantage), REFERENCE)
    assert not loss(REFERENCE, OLD, REFERENCE, TRUE, advantage).any()


def test_gradient_at_the_reference_is_m_times_that_of_uniform_awm() -> None:
    slopes = []
    awm = MatchingLoss("uniform", kl_weight=0.0, average_weight=0.0, scale_to=None)
    for loss in (RAMLoss(7.0), None):
        output = OLD.clone().requires_grad_()
        if loss is None:
            log_prob = awm.log_prob(output, TRUE, torch.ones(4))
            awm(log_prob, log_prob.detach(), ADVANTAGE).loss.backward()
        else:
            loss(output, OLD, OLD, TRUE, ADVANTAGE).mean().backward()
        slopes.append(output.grad)
    torch.testing.assert_close(slopes[0], 7 * slopes[1], rtol=1e-6, atol=1e-9)


def test_weights_keep_their_digits_beside_outputs_of_16_bits() -> None:
    rows = torch.ones(1, 1, dtype=torch.bfloat16)
    assert directed_target(rows * 0, rows, torch.tensor([123.45])).item() == pytest.approx(123.45)
