"""SoliReward's loss against numbers worked out by hand."""

import math

import pytest
import torch

from latentreward.reward import TieLoss
from tests.reward.losses.pairs import scores_of


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("d", [-2.0, 0.0, 1.5])
def test_pairs_ties_and_labels(d: float) -> None:
    """−log σ(x) = softplus(−x)."""
    margin, smoothing = 0.5, 0.2
    wins, loses = softplus(margin - d), softplus(margin + d)
    loss = TieLoss(margin=margin, tie_weight=3.0, label_smoothing=smoothing)
    found = loss.per_pair(scores_of(torch.tensor([d, d, d]), label=torch.tensor([1.0, 0.5, 0.75])))
    share = 0.75 * 0.8 + 0.25 * 0.2
    expected = [0.8 * wins + 0.2 * loses, 3 * (wins + loses), share * wins + (1 - share) * loses]
    assert found.tolist() == pytest.approx(expected)


def test_a_tie_is_least_at_equal_rewards() -> None:
    d = torch.zeros(1, requires_grad=True)
    tie = TieLoss(margin=3.0).per_pair(scores_of(d, label=0.5)).sum()
    tie.backward()
    assert tie.item() == pytest.approx(2 * softplus(3.0))
    assert d.grad.item() == pytest.approx(0.0)
