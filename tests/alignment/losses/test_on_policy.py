"""The loss of on-policy distillation: closed forms, and the gradient by finite differences."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import OnPolicyLoss

SHAPE = (3, 2, 2, 2)
SLOPE, STD = torch.tensor([-0.1, -0.2, -0.3]), torch.tensor([0.5, 0.4, 0.3])


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHERS = torch.stack([drawn(1), drawn(2)])


@pytest.mark.parametrize(
    ("factor", "wanted"),
    [("velocity", [4.0, 4.0, 4.0]), ("mean_match", [0.02, 0.08, 0.18]), ("kl_exact", [0.08, 0.5, 2.0])],
)
def test_factors_of_one_difference(factor: str, wanted: list[float]) -> None:
    """An output 2 away from the teacher's: 4 times 1, c²/2 and c²/2s²."""
    rows = OnPolicyLoss(factor)(TEACHERS[0] + 2, TEACHERS[:1], SLOPE, STD)
    torch.testing.assert_close(rows, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0.0)


def test_several_teachers_have_the_gradient_of_their_mean() -> None:
    slopes = []
    for teachers in (TEACHERS.clone().requires_grad_(), TEACHERS.mean(dim=0, keepdim=True).requires_grad_()):
        output = drawn(3).requires_grad_()
        OnPolicyLoss()(output, teachers, SLOPE, STD).mean().backward()
        slopes.append(output.grad)
        assert teachers.grad is None
    torch.testing.assert_close(*slopes)
