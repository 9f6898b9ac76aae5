"""DiffusionNFT's loss against numbers worked out by hand, its gradient, and what is refused."""

import pytest
import torch

from latentreward.alignment import NFTLoss
from latentreward.alignment.losses.nft import optimality


def rows(*values: float) -> torch.Tensor:
    """Rows of one element each, (B, 1, 1, 1)."""
    return torch.tensor(values).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ("all", [0.0, 0.4, 0.5, 0.6, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.6, 1.0]),
        ("negative_only", [0.0, 0.4, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_optimality_is_linear_in_the_advantage_and_clipped(signs: str, expected: list[float]) -> None:
    found = optimality(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), max_advantage=5.0, signs=signs)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_velocities_are_mixed_by_beta(beta: float) -> None:
    """v = 3, v_old = 1, u = 0: v⁺ = β·3 + (1 − β)·1 and v⁻ = (1 + β)·1 − β·3."""
    result = NFTLoss(beta=beta, kl_weight=0, space="velocity")(
        rows(3.0), rows(1.0), rows(0.0), torch.tensor([0.5]), torch.tensor([2.5])
    )
    plus, minus = 1 + 2 * beta, 1 - 2 * beta
    assert (result.positive.item(), result.negative.item()) == pytest.approx((plus**2, minus**2))
    assert result.optimality.item() == pytest.approx(0.75)
    assert result.loss.item() == pytest.approx(0.75 * plus**2 + 0.25 * minus**2)


def test_errors_of_clean_latents_are_divided_by_their_mean_absolute_value() -> None:
    """With one element e² / |e| = |e| = σ·|u − v±|; c / β stands before the mean."""
    result = NFTLoss(beta=0.5, kl_weight=0, max_advantage=4.0)(
        rows(3.0), rows(1.0), rows(0.0), torch.tensor([0.2]), torch.tensor([4.0])
    )
    assert result.positive.item() == pytest.approx(0.2 * 2.0)
    assert result.loss.item() == pytest.approx(4.0 / 0.5 * 0.2 * 2.0)


def test_two_targets_have_the_loss_of_diffusion_opsd_which_leaves_beta() -> None:
    result = NFTLoss(beta=0.5, kl_weight=0, max_advantage=4.0)(
        rows(3.0), rows(1.0), (rows(0.0), rows(9.0)), torch.tensor([0.2]), torch.tensor([4.0])
    )
    assert result.loss.item() == pytest.approx(4.0 * 0.2 * 2.0)


def test_good_samples_pull_the_velocity_to_the_target_and_bad_ones_push_it_away() -> None:
    """At v = v_old the gradient is that of (u − v⁺)² alone for r = 1, of (u − v⁻)² for r = 0: equal and opposite."""
    slopes = []
    for advantage in (5.0, -5.0):
        velocity = rows(1.0).requires_grad_()
        loss = NFTLoss(kl_weight=0, space="velocity")
        loss(velocity, rows(1.0), rows(0.0), torch.tensor([0.5]), torch.tensor([advantage])).loss.backward()
        slopes.append(velocity.grad.item())
    assert slopes == pytest.approx([2.0, -2.0])


def test_the_reference_adds_its_mean_square() -> None:
    loss = NFTLoss(kl_weight=0.5, space="velocity")
    given = (rows(1.0), rows(1.0), rows(1.0), torch.tensor([0.5]), torch.tensor([0.0]))
    assert loss(*given, rows(3.0)).loss.item() == pytest.approx(0.5 * 4.0)
    with pytest.raises(ValueError, match="reference"):
        loss(*given)
