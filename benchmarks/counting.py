"""Counter of what a GPU would do: operations, kernels, bytes and reads by the host; counted on a CPU, no time."""

import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from latentreward.apps.estimate.shapes import complete_flop_formulas, flops_of

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero)
"""Operations after which the host waits for a value on the device."""
IDLE = {
    *("_local_scalar_dense", "_unsafe_view", "detach", "is_same_size", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
"""Names of operations that start no kernel, beside those that return a view."""


@dataclass(frozen=True)
class Work:
    """Counts of a part of the program."""

    flops: int = 0  # floating point operations, two for each multiply-accumulate
    kernels: int = 0  # operations that compute; one for all tensors of a ``foreach`` operation
    bytes: int = 0  # bytes of the tensors that these read and write, as if nothing were fused
    reads: int = 0  # values that the host waits for, such as by ``item``; an optimiser's step numbers lie on the host

    def __sub__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(Work)))

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)))


class WorkCounter(TorchDispatchMode):
    """Dispatch mode that counts :class:`Work`.

    Args:
        sources: Whether to count the reads by the line of the program they come from, too.

    Attributes:
        by_name: Number of kernels by the name of the operation.
        read_at: Number of reads by line, with ``sources``.
    """

    def __init__(self, sources: bool = False) -> None:
        super().__init__()
        complete_flop_formulas()
        self.flops = self.kernels = self.bytes = self.reads = 0
        self.sources, self.by_name, self.read_at = sources, Counter[str](), Counter[str]()
        self.on_host: set[int] = set()  # addresses of tensors that a GPU's run keeps on the host

    @property
    def work(self) -> Work:
        """Counts so far."""
        return Work(self.flops, self.kernels, self.bytes, self.reads)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation; see :class:`TorchDispatchMode`."""
        kwargs, packet = kwargs or {}, func._overloadpacket
        if torch.is_inference_mode_enabled() and packet not in flop_registry:  # operations come that others make up
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if packet in READS:
            if not (isinstance(args[0], Tensor) and args[0].data_ptr() in self.on_host):
                self.reads += 1
                if self.sources:
                    self.read_at[reader()] += 1
        elif computes(func):
            self.kernels += 1
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
            self.flops += flops_of(func, args, kwargs, result)
            self.by_name[packet.__name__] += 1
        return result


@cache
def computes(func: Any) -> bool:
    """Tell whether an operation starts a kernel."""
    if getattr(func, "is_view", False) or getattr(func, "namespace", "") == "prim":  # prim: of stand-ins, their device
        return False
    return func.__name__.partition(".")[0] not in IDLE


def reader() -> str:
    """Return the lines of the program, the innermost first, that read a value now."""
    outer = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][-2::-1]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in outer[:8])
