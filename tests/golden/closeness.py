"""How close is close enough."""

from typing import Any

import torch
from torch import Tensor

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}


def default_tolerance(*tensors: Tensor) -> dict[str, float]:
    """1e-5 relative + 1e-6 absolute; 2e-2 if anything is bfloat16."""
    return BFLOAT16 if any(tensor.dtype == torch.bfloat16 for tensor in tensors) else FLOAT32


def assert_close(actual: Tensor, golden: Tensor, name: str, **tolerance: Any) -> None:
    """Compare in float64, dtypes aside; without a tolerance :func:`default_tolerance` holds.

    The absolute tolerance of a gradient is in units of its largest element, where that is below 1: gradients of means
    over many elements may all lie below any fixed one.
    """
    tolerance = tolerance or default_tolerance(actual, golden)
    if "grad" in name and 0 < (largest := golden.double().abs().max().item()) < 1:
        tolerance = {**tolerance, "atol": tolerance["atol"] * largest}
    assert actual.shape == golden.shape, f"{name}: shape {tuple(actual.shape)}, golden {tuple(golden.shape)}"
    torch.testing.assert_close(
        actual.detach().double(), golden.double(), msg=lambda text: f"{name}: {text}", **tolerance
    )


def assert_within(actual: Tensor, golden: Tensor, name: str, tolerance: float) -> None:
    """Compare as golden/algos asks: the largest difference is at most ``tolerance`` of the largest golden value.

    Where all golden values are 0, differences are at most 1e-7. Integers and booleans are equal.
    """
    assert actual.shape == golden.shape, f"{name}: shape {tuple(actual.shape)}, golden {tuple(golden.shape)}"
    if not golden.is_floating_point():
        assert torch.equal(actual.to(golden.dtype), golden), name
        return
    worst = (actual.detach().double() - golden.double()).abs().max().item()
    room = tolerance * golden.double().abs().max().item() or 1e-7
    assert worst <= room, f"{name}: {worst:g} > {room:g}"
