"""The climb of a reward: its radius, its number of gradients, mirror images, and a loss that they do not change."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import NFTLoss, reward_ascent

ANCHOR = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
RADIUS = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)


def slope_of(latents: Tensor) -> Tensor:
    """Of Σ sin x."""
    return latents.cos()


def distances(ends: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack([(end - ANCHOR).flatten(1).norm(dim=1) for end in ends])


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.0, 50.0])
def test_no_target_lies_beyond_the_radius(rate: float) -> None:
    found = distances(reward_ascent(ANCHOR, slope_of, RADIUS, 3, rate))
    assert (found <= RADIUS * (1 + 1e-12)).all()
    assert (found > 0.29 * RADIUS).all()


def test_the_reward_rises_and_falls() -> None:
    up, down = reward_ascent(ANCHOR, slope_of, RADIUS, 2)
    values = [latents.sin().flatten(1).sum(dim=1) for latents in (down, ANCHOR, up)]
    assert (values[0] < values[1]).all() and (values[1] < values[2]).all()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_first_gradient_is_shared(steps: int) -> None:
    asked: list[Tensor] = []
    reward_ascent(ANCHOR, lambda latents: asked.append(latents) or slope_of(latents), RADIUS, steps)
    assert len(asked) == 2 * steps - 1


def test_a_flat_reward_leaves_the_prediction() -> None:
    assert all(torch.equal(end, ANCHOR) for end in reward_ascent(ANCHOR, torch.zeros_like, RADIUS))


def test_after_one_step_the_optimality_does_not_count() -> None:
    """The targets are mirror images, so that both branches have the same error for every output."""
    ends = reward_ascent(ANCHOR, slope_of, RADIUS, 1)
    torch.testing.assert_close(ends[0] + ends[1], 2 * ANCHOR)
    output = torch.randn(ANCHOR.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = [
        # Outputs are clean latents' negatives here, at level 1.
        NFTLoss(kl_weight=0.0)(output, -ANCHOR, (-ends[0], -ends[1]), torch.ones(3), torch.full((3,), advantage)).loss
        for advantage in (-5.0, 0.0, 1.0, 5.0)
    ]
    torch.testing.assert_close(torch.stack(found), found[0].expand(4))
