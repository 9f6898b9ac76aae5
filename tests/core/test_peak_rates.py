"""Peak rates of cards, and the work of operators."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentreward.core.peak_rates import LAUNCH, Limits, Work, find_limits, work_of

CARD = Limits("a card, bf16-mixed", tflops=2.0, bandwidth=0.5)
TERA = 10**12


class Counted(TorchDispatchMode):
    """Mode that counts the work of real operators."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.work += work_of(func, args, kwargs or {}, result)
        return result


def test_work_of_operators() -> None:
    first, second = torch.ones(3, 4), torch.ones(4, 5, dtype=torch.float64)
    with Counted() as counted:
        product = first @ second.float()
        product.add_(1.0)
        product.T[1:].detach().flatten()[0].item()
        torch.empty(7)
    convert, multiply, add = 20 * (8 + 4), (12 + 20 + 15) * 4, 2 * 15 * 4
    copy = 2 * 12 * 4  # `flatten` of a transposed tensor
    assert counted.work == Work(2 * 3 * 4 * 5, convert + multiply + add + copy, 4)


def test_seconds_of_each_limit() -> None:
    work = Work(flops=4 * TERA, bytes=3 * TERA, kernels=1000)
    assert CARD.bounds(work) == {"arithmetic": 2.0, "traffic": 6.0, "launches": 1000 * LAUNCH}


def test_peaks_by_precision() -> None:
    assert find_limits("H200", None) == ("H200, 32-true", 66.9, 4.8)
    assert find_limits("H200", "32-true", tf32=True) == ("H200, 32-true", 494.7, 4.8)
