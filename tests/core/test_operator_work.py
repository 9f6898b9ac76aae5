"""The work of operators."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentreward.core.operator_work import Work, work_of


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
