"""The clipped policy objective: value and slope against slow formulas, clipping, the penalty."""

import numpy as np
import pytest
import torch

from latentreward.alignment import ClippedPolicyLoss, gaussian_step_kl
from tests.oracles import alignment_losses as oracle


@pytest.mark.parametrize("clip_range", [1e-4, 0.1])
def test_value_and_slope(clip_range: float) -> None:
    old = torch.randn(9, dtype=torch.float64)
    new = (old + 2 * clip_range * torch.randn(9, dtype=torch.float64)).requires_grad_()
    advantage = 4 * torch.randn(9, dtype=torch.float64)
    result = ClippedPolicyLoss(clip_range)(new, old, advantage)
    result.loss.backward()
    arrays = [tensor.detach().numpy() for tensor in (new, old, advantage)]
    assert result.loss.item() == pytest.approx(oracle.clipped_policy(*arrays, clip_range, 5.0), rel=1e-6)
    for row in range(9):
        step = np.zeros(9)
        step[row] = 1e-7
        high, low = (oracle.clipped_policy(arrays[0] + s * step, *arrays[1:], clip_range, 5.0) for s in (1, -1))
        assert new.grad[row].item() == pytest.approx((high - low) / 2e-7, rel=1e-4, abs=1e-6)
    assert result.kl == 0


def test_a_step_past_the_range_teaches_no_more_but_one_in_the_wrong_direction_does() -> None:
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    result = ClippedPolicyLoss(0.1)(log_prob, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    result.loss.backward()
    assert (log_prob.grad == 0).tolist() == [True, False, False, True]
    assert result.clipped == 1


def test_kl_is_that_of_two_gaussians() -> None:
    mean, reference, spread = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.5, 1.0, 2.0])
    normal = torch.distributions.Normal
    widths = spread.view(3, 1, 1, 1)
    expected = torch.distributions.kl_divergence(normal(mean, widths), normal(reference, widths))
    torch.testing.assert_close(gaussian_step_kl(mean, reference, spread), expected.flatten(1).mean(dim=1))


def test_penalty_is_weighted_and_asked_for() -> None:
    loss, zeros = ClippedPolicyLoss(kl_weight=0.5), torch.zeros(2)
    result = loss(zeros, zeros, zeros, torch.tensor([1.0, 3.0]))
    assert result.loss == 1
    assert result.kl == 2
    with pytest.raises(ValueError, match="needs kl"):
        loss(zeros, zeros, zeros)
