"""Losses of a reward against numbers worked out by hand."""

import math

import pytest
import torch

from latentreward.alignment import RewardLoss


@pytest.mark.parametrize(
    ("settings", "loss", "slopes"),
    [
        ({}, -1.5, [-0.5, -0.5]),
        ({"scale": 0.1}, -0.15, [-0.05, -0.05]),
        ({"ceiling": 2.0, "scale": 0.1}, 0.1 * (2 + 0) / 2, [-0.05, 0.0]),  # rewards 0 and 3: 3 lies above the ceiling
        ({"ceiling": 4.0}, (4 + 1) / 2, [-0.5, -0.5]),
    ],
)
def test_loss_and_gradient(settings: dict[str, float], loss: float, slopes: list[float]) -> None:
    rewards = torch.tensor([0.0, 3.0], requires_grad=True)
    found = RewardLoss(**settings)(rewards)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert rewards.grad.tolist() == pytest.approx(slopes)


def test_the_logistic_function_takes_the_rewards_place() -> None:
    rewards = torch.tensor([0.7], requires_grad=True)
    found = RewardLoss(scale=0.1, ceiling=2.0, sigmoid=True)(rewards)
    found.backward()
    good = 1 / (1 + math.exp(-0.7))
    assert found.item() == pytest.approx(0.1 * (2 - good))
    assert rewards.grad.item() == pytest.approx(-0.1 * good * (1 - good))
