"""Linear-DPO's weight, loss and labels against numbers worked out by hand."""

import pytest
import torch

from latentreward.alignment import LinearDPO

BETA = 2.0


def result_of(
    errors: tuple[float, float], reference: tuple[float, float], label: float | None = None, eta: float = 0.1
):
    """Result for one pair whose policy and reference have these errors (chosen, rejected); targets are 0."""
    outputs = [torch.tensor(each).sqrt().reshape(2, 1, 1, 1) for each in (errors, reference)]
    labels = None if label is None else torch.tensor([label])
    return LinearDPO(eta)(*outputs, torch.zeros(2, 1, 1, 1), BETA, labels)


def test_the_weight_falls_linearly_with_the_margin_and_is_clipped() -> None:
    """m = −β/2 ((e_w − e_w,ref) − (e_l − e_l,ref)); u = ½ − 0.4 m."""
    for chosen, margin, weight in (
        (1.0, 0.0, 0.5),
        (0.5, 0.5, 0.3),
        (1.5, -0.5, 0.7),
        (0.0, 1.0, 0.1),
        (4.0, -3.0, 0.9),
    ):
        result = result_of((chosen, 2.0), (1.0, 2.0))
        assert (result.margin.item(), result.weight.item()) == pytest.approx((margin, weight), abs=1e-6)
        assert result.per_pair.item() == pytest.approx(weight * (chosen - 2.0), abs=1e-6)


def test_a_label_weighs_both_orders() -> None:
    result = result_of((0.5, 2.0), (1.0, 2.0), label=0.75)
    weight = 0.75 * 0.3 - 0.25 * 0.7
    assert (result.weight.item(), result.per_pair.item()) == pytest.approx((weight, weight * -1.5), abs=1e-6)


def test_the_weight_has_no_gradient() -> None:
    prediction = torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1).requires_grad_()
    result = LinearDPO(0.1)(prediction, torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), BETA)
    result.per_pair.sum().backward()
    slopes = result.weight.item() * torch.tensor([2 * 0.5, -2 * 2.0])
    torch.testing.assert_close(prediction.grad.flatten(), slopes)
