"""AWM's log-probability, divergences and loss against numbers worked out by hand."""

import pytest
import torch

from latentreward.alignment import MatchingLoss, velocity_divergence
from latentreward.alignment.losses.matching import matching_log_prob

VELOCITY, TARGET = torch.full((1, 1, 2, 2), 2.5), torch.full((1, 1, 2, 2), 0.5)  # m = 4
SIGMA = torch.tensor([0.3])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("uniform", -4.0), ("t", -4 * 0.3), ("t2", -4 * 0.09), ("huber", -(2 - 1e-5) * 0.3)],
)
def test_log_prob_is_the_weighted_error(weighting: str, expected: float) -> None:
    assert matching_log_prob(VELOCITY, TARGET, SIGMA, weighting).item() == pytest.approx(expected)  # type: ignore[arg-type]


def test_divergence_by_elbo_divides_by_twice_the_steps_variance() -> None:
    """s² = 0.49 σ / (1 − σ)."""
    assert velocity_divergence(VELOCITY, TARGET, SIGMA).item() == pytest.approx(4.0)
    variance = 0.49 * 0.3 / 0.7
    assert velocity_divergence(VELOCITY, TARGET, SIGMA, "elbo").item() == pytest.approx(4 / (2 * variance))
    near_one = velocity_divergence(VELOCITY, TARGET, torch.tensor([1.0]), "elbo").item()
    assert near_one == pytest.approx(4 * 0.01 / (2 * 0.49))  # σ of 0.99 in 1 − σ


def test_at_ratio_1_the_gradient_is_minus_the_scaled_advantage() -> None:
    log_prob = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss = MatchingLoss(kl_weight=0, average_weight=0)
    result = loss(log_prob, log_prob.detach(), torch.tensor([2.5, -20.0]))
    result.loss.backward()
    assert log_prob.grad.tolist() == pytest.approx([-0.5 / 2, 1.0 / 2])  # 2.5 / 5, and −20 held at −5
    assert (result.ratio.item(), result.clipped.item()) == (1.0, 0.0)


def test_divergences_are_added_with_their_weights() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    loss = MatchingLoss(kl_weight=0.1, average_weight=2.0)
    result = loss(zero, zero, torch.zeros(2), kl=torch.tensor([1.0, 3.0]), average_kl=torch.tensor([0.5, 0.5]))
    assert result.loss.item() == pytest.approx(0.1 * 2 + 2 * 0.5)
    with pytest.raises(ValueError, match="divergence"):
        loss(zero, zero, torch.zeros(2))
