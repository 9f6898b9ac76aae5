"""Bradley–Terry: values and slopes against 50-digit arithmetic, the margin, refused constants."""

import mpmath
import pytest
import torch

from latentreward.reward import BradleyTerryLoss
from tests.oracles import preference_losses as oracle
from tests.reward.losses.pairs import scores_of

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("label", [1.0, 0.9, 0.7, 0.5, 0.2, 0.0])
def test_value_and_gradient_equal_50_digits(label: float) -> None:
    label = torch.tensor(label).item()
    margins = torch.tensor([0.0, 1e-8, 1e-4, 0.3, 4.0, 60.0, -1e-8, -1e-4, -0.3, -4.0, -60.0], requires_grad=True)
    values = BradleyTerryLoss().per_pair(scores_of(margins, label))
    values.sum().backward()
    exact = lambda d: oracle.bradley_terry(d, label)  # noqa: E731
    for value, slope, margin in zip(values.tolist(), margins.grad.tolist(), margins.tolist(), strict=True):
        assert value == pytest.approx(float(exact(mpmath.mpf(margin))), rel=1e-5, abs=1e-7)
        expected = float(oracle.slope(exact, mpmath.mpf(margin)))
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("lead", [0.0, 1.0])
@pytest.mark.parametrize("label", [1.0, 0.7, 0.5, 0.0])
def test_finite_for_every_float32_margin(label: float, lead: float) -> None:
    margins = torch.tensor([LARGEST, -LARGEST, 1e6, -1e6, 0.0], requires_grad=True)
    scores = scores_of(margins, label)
    loss = BradleyTerryLoss(lead)
    loss(scores).backward()
    assert loss.per_pair(scores).float().isfinite().all()
    assert margins.grad.isfinite().all()


def test_margin_shifts_certain_pairs_and_spares_ties() -> None:
    margins = torch.tensor([-0.4, 0.0, 1.3])
    plain, led = BradleyTerryLoss(), BradleyTerryLoss(1.0)
    torch.testing.assert_close(led.per_pair(scores_of(margins)), plain.per_pair(scores_of(margins - 1.0)))
    torch.testing.assert_close(led.per_pair(scores_of(margins, 0.0)), plain.per_pair(scores_of(margins + 1.0, 0.0)))
    torch.testing.assert_close(led.per_pair(scores_of(margins, 0.5)), plain.per_pair(scores_of(margins, 0.5)))
