"""Limits of a card: peak rates by name, and the work of operators that they bound."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

LAUNCH = 6e-6
"""Seconds from the start of one kernel to that of the next, if the host starts them one by one: on an H200's host."""
IDLE = {
    *("_local_scalar_dense", "_unsafe_view", "detach", "is_same_size", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
"""Names of operators that start no kernel, beside those that return a view."""

# Not Lightning's table (lightning.fabric.utilities.throughput): it has no bandwidth, neither B200 nor MI300X, and of
# H200 and H100 NVL the rates with sparsity, twice as high. Where a data sheet has only these, half of them stands here.
PEAKS = {
    "A100[- ]SXM4-40GB|A100-PCIE-40GB": (312, 19.5, 1.555),  # NVIDIA A100 data sheet, 2021
    "A100 80GB PCIe": (312, 19.5, 1.935),  # the same
    "A100": (312, 19.5, 2.039),  # the same
    "H100 PCIe": (756, 51.2, 2.0),  # NVIDIA H100 data sheet, 2023
    "H100 NVL": (835.5, 60, 3.9),  # the same
    "H100": (989.4, 66.9, 3.35),  # the same
    "H200 NVL": (835.5, 60, 4.8),  # NVIDIA H200 data sheet, 2024
    "H200": (989.4, 66.9, 4.8),  # the same
    "B200": (2250, 75, 8.0),  # NVIDIA DGX B200 data sheet, 2024: an eighth of eight cards
    "L40S": (362, 91.6, 0.864),  # NVIDIA L40S data sheet, 2023
    "L4": (121, 30.3, 0.3),  # NVIDIA L4 data sheet, 2023
    "A10": (125, 31.2, 0.6),  # NVIDIA A10 data sheet, 2021
    "3090": (71, 35.6, 0.936),  # NVIDIA Ampere GA102 white paper, 2020
    "4090": (165.2, 82.6, 1.008),  # NVIDIA Ada white paper, 2022
    "5090": (209.5, 104.8, 1.792),  # NVIDIA RTX Blackwell white paper, 2025
    "MI300X": (1307.4, 163.4, 5.3),  # AMD Instinct MI300X data sheet, 2023
    "MI325X": (1307.4, 163.4, 6.0),  # AMD Instinct MI325X data sheet, 2024
}
"""Words in the name of a card (regular expression) → 10¹² operations per second of matrix products in bfloat16 and
float16 (summed in float32) and in float32, and 10¹² bytes per second of memory traffic, without sparsity."""


class Limits(NamedTuple):
    """Peak rates of a card under a trainer's precision: 10¹² operations and 10¹² bytes per second."""

    name: str
    tflops: float
    bandwidth: float

    def bounds(self, work: "Work") -> dict[str, float]:
        """Return the seconds that arithmetic, traffic and launches each ask for at least."""
        traffic = work.bytes / self.bandwidth / 1e12
        return {"arithmetic": work.flops / self.tflops / 1e12, "traffic": traffic, "launches": work.kernels * LAUNCH}


def find_limits(card: str, precision: str | int | None) -> Limits | None:
    """Return the limits of a card by its name, such as ``NVIDIA H100 80GB HBM3``; None for cards not in :data:`PEAKS`.

    ``precision`` is a trainer's.
    """
    for words, (half, single, bandwidth) in PEAKS.items():
        # A laptop's card, a 3090 Ti and a 4090 D are other chips; a MIG slice is a part of one.
        if re.search(rf"\b(?:{words})\b(?! (?:D|Ti|Laptop)\b)(?!.*\bMIG\b)", card, re.IGNORECASE):
            tflops = half if "16" in str(precision) else single
            return Limits(f"{card}, {precision or '32-true'}", tflops, bandwidth)
    return None


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


def recomputes() -> bool:
    """Tell whether an operator belongs to a block that gradient checkpointing computes again in a backward pass."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
