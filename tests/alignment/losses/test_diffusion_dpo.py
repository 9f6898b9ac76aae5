"""Diffusion-DPO's implicit rewards: value and slope against slow formulas, and what float32 keeps of them."""

import pytest
import torch

from latentreward.alignment import denoising_error, implicit_rewards
from latentreward.core.contracts import PairScores
from latentreward.reward import BradleyTerryLoss
from tests.oracles import alignment_losses as oracle


def loss_of(rewards: torch.Tensor) -> torch.Tensor:
    chosen, rejected = rewards.chunk(2)
    ones = torch.ones(len(chosen))
    return BradleyTerryLoss()(PairScores(chosen, rejected, ones, ones, ones, ones))


@pytest.mark.parametrize("spread", [1e-3, 0.1])
@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 3, 3, 3)], ids=["image", "video"])
def test_value_and_slope(spread: float, shape: tuple[int, ...]) -> None:
    target, reference = torch.randn(2, 6, *shape)
    prediction = (reference + spread * torch.randn(6, *shape)).requires_grad_()
    loss = loss_of(implicit_rewards(prediction, reference, target, 2000.0))
    loss.backward()
    arrays = [tensor.detach().double().numpy() for tensor in (prediction, reference, target)]
    assert loss.item() == pytest.approx(oracle.diffusion_dpo(*arrays, 2000.0), rel=1e-4)
    row, step = (4, *(0 for _ in shape)), 1e-6
    values = []
    for sign in (1, -1):
        moved = arrays[0].copy()
        moved[row] += sign * step
        values.append(oracle.diffusion_dpo(moved, *arrays[1:], 2000.0))
    assert prediction.grad[row].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-7)


def test_small_changes_survive_float32() -> None:
    target, reference = torch.randn(2, 2, 4, 32, 32)
    prediction = reference + 1e-6 * torch.randn_like(reference)
    exact = (
        -0.5
        * 5000
        * ((prediction.double() - target.double()).square() - (reference.double() - target.double()).square())
        .flatten(1)
        .mean(dim=1)
    )
    torch.testing.assert_close(implicit_rewards(prediction, reference, target).double(), exact, rtol=2e-2, atol=0)


def test_bfloat16_predictions_are_computed_in_float32() -> None:
    target, reference = torch.randn(2, 2, 4, 4, 4)
    prediction = reference.bfloat16() + 0.5
    rewards = implicit_rewards(prediction, reference.bfloat16(), target)
    assert rewards.dtype == torch.float32
    change = denoising_error(prediction, target) - denoising_error(reference.bfloat16(), target)
    torch.testing.assert_close(rewards, -2500 * change, rtol=1e-4, atol=1e-2)
