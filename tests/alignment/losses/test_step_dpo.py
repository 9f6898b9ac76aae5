"""Step-level DPO: value and slope against slow formulas, clamping, float32 and autocast."""

import numpy as np
import pytest
import torch
from torch import Tensor

from latentreward.alignment import StepDPO
from tests.oracles import alignment_losses as oracle


def columns(scale: float = 1e-3, rows: int = 7) -> list[Tensor]:
    reference = torch.randn(2, rows, dtype=torch.float64)
    return [*(reference + scale * torch.randn(2, rows, dtype=torch.float64)), *reference]


@pytest.mark.parametrize(("beta", "clip_range"), [(500.0, 0.1), (10.0, 0.1), (500.0, 0.02)])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3])
def test_value_and_slope(scale: float, beta: float, clip_range: float) -> None:
    drawn = columns(scale)
    policy = [column.requires_grad_() for column in drawn[:2]]
    result = StepDPO(beta, clip_range)(*policy, *drawn[2:])
    rows = torch.stack([column.detach() for column in drawn], dim=1).numpy()
    assert result.loss.item() == pytest.approx(oracle.step_dpo(rows, beta, clip_range), rel=1e-6)
    result.loss.backward()
    step = 1e-6
    for column, values in enumerate(policy):
        for row in range(len(rows)):
            moved = [rows.copy() for _ in range(2)]
            moved[0][row, column] += step
            moved[1][row, column] -= step
            high, low = (oracle.step_dpo(each, beta, clip_range) for each in moved)
            assert values.grad[row].item() == pytest.approx((high - low) / (2 * step), rel=1e-3, abs=1e-5)


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_half_beta() -> None:
    log_prob = torch.full((4,), -1.3, requires_grad=True)
    result = StepDPO()(log_prob, log_prob.detach(), log_prob.detach(), log_prob.detach())
    result.loss.backward()
    assert result.loss.item() == pytest.approx(np.log(2))
    torch.testing.assert_close(log_prob.grad, torch.full((4,), -500 / 2 / 4))
    assert result.implicit_accuracy == 0  # equal ratios are no win
    assert result.clamped == 0


def test_a_ratio_clamped_on_both_sides_has_a_finite_loss_and_no_gradient() -> None:
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    result = StepDPO()(chosen, rejected, torch.zeros(1), torch.zeros(1))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(100.335, abs=1e-3)
    assert chosen.grad == 0
    assert rejected.grad == 0
    assert result.clamped == 1


def test_diagnostics() -> None:
    chosen, rejected = torch.tensor([0.05, -0.02, 0.5]), torch.tensor([0.0, 0.02, 0.0])
    result = StepDPO()(chosen, rejected, torch.zeros(3), torch.zeros(3))
    assert result.implicit_accuracy.item() == pytest.approx(2 / 3)
    assert result.clamped.item() == pytest.approx(1 / 3)
    expected = (np.exp(0.05) - 1 + np.exp(-0.02) - np.exp(0.02) + 1.1 - 1) / 3
    assert result.margin.item() == pytest.approx(expected)


def test_float32_and_autocast_keep_small_ratios() -> None:
    drawn = [column.float() for column in columns(1e-4)]
    plain = StepDPO()(*drawn).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = StepDPO()(*drawn).loss
    assert torch.equal(plain, under)
    assert plain.dtype == torch.float32
    rows = torch.stack(drawn, dim=1).double().numpy()
    assert plain.item() == pytest.approx(oracle.step_dpo(rows, 500.0, 0.1), rel=1e-6)
