"""Work of operators: operations, bytes and kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

IDLE = {
    *("_local_scalar_dense", "_unsafe_view", "detach", "is_same_size", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
"""Names of operators that start no kernel, beside those that return a view."""


def complete_flop_formulas() -> None:
    """Let torch count FLOPs that ``FlopCounterMode`` leaves out in torch 2.13: attention on CPUs, sums in place."""
    aten = torch.ops.aten
    if aten.addmm_ not in flop_registry:
        register_flop_formula(aten.addmm_, get_raw=True)(flop_registry[aten.addmm])
    for suffix in ("", "_backward"):
        on_cpu = getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}")
        if on_cpu not in flop_registry:
            formula = flop_registry[getattr(aten, f"_scaled_dot_product_flash_attention{suffix}")]
            register_flop_formula(on_cpu, get_raw=True)(formula)


def flops_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the FLOPs of one call of an operator, by the formulas of ``FlopCounterMode``."""
    formula = flop_registry.get(getattr(func, "_overloadpacket", func))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


@dataclass(frozen=True)
class Work:
    """Work of operators."""

    flops: int = 0  # operations of matrix products, convolutions and attention
    bytes: int = 0  # bytes that operators read and write, as if nothing were fused
    kernels: int = 0  # operators that compute; one for all tensors of a ``foreach`` operation

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.kernels + other.kernels)


@cache
def computes(func: Any) -> bool:
    """Tell whether an operator starts a kernel."""
    if getattr(func, "is_view", False) or getattr(func, "namespace", "") == "prim":  # prim: of stand-ins, their device
        return False
    return func.__name__.partition(".")[0] not in IDLE


def work_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Work:
    """Return the work of one call of an operator."""
    if not computes(func):
        return Work()
    moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
    return Work(flops_of(func, args, kwargs, result), moved, 1)
