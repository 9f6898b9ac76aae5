"""Stand-in tensors, which have a shape and dtype but no values, and counters of memory and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

CPU = torch.device("cpu")
NUMBERS = {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Dtype → value that ``item()`` of a stand-in returns; 0 for other dtypes."""
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
"""Operations with a list of index tensors as second argument."""


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


class LiveBytes:
    """Counter of the bytes of live tensor storages; a storage shared by several tensors counts once."""

    def __init__(self) -> None:
        self.now = 0  # bytes at present
        self.peak = 0  # greatest number of bytes so far; callers may set it, to measure a new section
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until the storage is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            key = storage._cdata

            def drop() -> None:
                self.now -= self._sizes.pop(key)

            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, drop)


class ShapesOnly(TorchDispatchMode):
    """Dispatch mode that computes only shape, dtype and device of operations on stand-in tensors.

    Operations on ordinary tensors run normally. Stand-ins report the CPU as their device, so they can be combined with
    a module's ordinary tensors and generators. ``item()`` of a stand-in returns a constant (:data:`NUMBERS`), and
    ``nonzero()`` treats all elements as non-zero.

    FLOPs are counted by the formulas of ``FlopCounterMode``. That mode itself is not used, because it would keep the
    tensors of checkpointed blocks alive.
    """

    def __init__(self) -> None:
        super().__init__()
        complete_flop_formulas()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = LiveBytes()  # of the stand-ins
        self.flops = 0  # of all operations on stand-ins so far
        self.rollout_rows = 0  # rows of the rollout that was made, with all candidates kept; 0 without one

    def stand_in(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a new stand-in tensor."""
        tensor = FakeTensor(self._fake, torch.empty(tuple(shape), dtype=dtype, device="meta"), CPU)
        self.live.add(tensor)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if not any(map(is_stand_in, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return NUMBERS.get(args[0].dtype, 0)
        if func is torch.ops.aten.nonzero.default:
            return self._nonzero(args[0])
        if func in INDEXING:
            indices: list[Tensor | None] = []
            for index in args[1]:  # a mask becomes index tensors, one per dimension
                is_mask = index is not None and index.dtype == torch.bool
                indices += self._nonzero(index).unbind(1) if is_mask else [index]
            args = (args[0], indices, *args[2:])
        result = self._fake.dispatch(func, types, args, kwargs)  # to enter the mode each time would look for GPUs
        self.flops += flops_of(func, args, kwargs, result)
        for leaf in tree_leaves(result):
            if is_stand_in(leaf):
                self.live.add(leaf)
        return result

    def _nonzero(self, tensor: Tensor) -> Tensor:
        return self.stand_in((tensor.numel(), tensor.ndim), torch.int64) if is_stand_in(tensor) else tensor.nonzero()


def replace_tensors(module: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace all parameters and buffers by ``make(own name, tensor)``; a shared one gets one replacement."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = make(name, old)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[id(old)]


def is_stand_in(value: Any) -> bool:
    """Tell whether a value is a stand-in tensor."""
    return isinstance(value, FakeTensor)


class SavedTensors(saved_tensors_hooks):
    """Context in which the tensors that autograd keeps for the backward pass are counted.

    A storage counts once; the storages of ``weights`` do not count.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.bytes = LiveBytes()
        known = {weight.untyped_storage()._cdata for weight in weights}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in known:
                self.bytes.add(tensor)
            return tensor

        super().__init__(pack, lambda tensor: tensor)


IN_FLOAT32 = (
    (F, "layer_norm", "layer_norm"),
    (F, "group_norm", "group_norm"),
    (F, "rms_norm", "rms_norm"),
    (F, "softmax", "softmax.int"),
    (torch, "softmax", "softmax.int"),
    (Tensor, "softmax", "softmax.int"),
    (F, "interpolate", "upsample_nearest2d"),
)
"""Functions that autocast computes in float32 on GPUs but not on CPUs, as (owner, name, ATen operation).

Only functions on large tensors are listed.
"""


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Let autocast on the CPU compute the functions of :data:`IN_FLOAT32` in float32, so memory is that of a GPU.

    The functions are replaced for the duration of the context. A ``TorchFunctionMode`` would not do: it is off in the
    backward pass, where checkpointed blocks are recomputed.
    """

    def as_float32(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                arguments, named = tuple(map(as_float32, arguments)), {key: as_float32(v) for key, v in named.items()}
            return function(*arguments, **named)

        return call

    with ExitStack() as stack:
        for owner, name, _ in IN_FLOAT32:
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, in_float32(original))
        yield
