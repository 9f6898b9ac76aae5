"""Tensors with shapes and no numbers, and what is counted while a module runs on them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CPU = torch.device("cpu")
NUMBERS = {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Type → value that Python code gets where it asks a tensor without numbers for one; 0 for others."""
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
"""Operations that take a list of indices after the tensor."""


class LiveBytes:
    """Bytes of the storages that exist, each counted once.

    Attributes:
        now: Bytes at present.
        peak: Greatest number so far; may be set.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


class ShapesOnly(TorchDispatchMode):
    """Runs operations on stand-in tensors by shape, type and device alone; ordinary tensors compute as ever.

    Stand-ins say that they are on the CPU, so that a module's own tables and generators, which are, work as they do in
    training. Where code asks for a number, it gets a constant; where it looks for elements that are not zero, all are.

    FLOPs are counted by the formulas of ``FlopCounterMode``, which itself would keep tensors of checkpointed blocks.

    Attributes:
        live: Bytes of the stand-ins that exist.
        flops: FLOPs of the operations on them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live, self.flops = LiveBytes(), 0

    def stand_in(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor without numbers."""
        tensor = FakeTensor(self._fake, torch.empty(tuple(shape), dtype=dtype, device="meta"), CPU)
        self.live.add(tensor)
        return tensor

    def replace_weights(self, module: nn.Module) -> None:
        """Put stand-ins in the place of a module's parameters and buffers; those that are shared stay so."""
        made: dict[int, Any] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, old in tensors.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        new = self.stand_in(old.shape, old.dtype)
                        is_parameter = isinstance(old, nn.Parameter)
                        made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                    tensors[name] = made[id(old)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See :class:`TorchDispatchMode`."""
        kwargs = kwargs or {}
        if not any(map(is_stand_in, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return NUMBERS.get(args[0].dtype, 0)
        if func is torch.ops.aten.nonzero.default:
            return self._nonzero(args[0])
        if func in INDEXING:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        result = self._fake.dispatch(func, types, args, kwargs)  # entering the mode would look for GPUs each time
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if is_stand_in(leaf):
                self.live.add(leaf)
        return result

    def _nonzero(self, tensor: Tensor) -> Tensor:
        return self.stand_in((tensor.numel(), tensor.ndim), torch.int64) if is_stand_in(tensor) else tensor.nonzero()

    def _without_masks(self, indices: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Indices in which places stand for masks."""
        places: list[Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype == torch.bool
            places += self._nonzero(index).unbind(1) if is_mask else [index]
        return places


def is_stand_in(value: Any) -> bool:
    """Whether a value is a tensor without numbers."""
    return isinstance(value, FakeTensor)


class SavedTensors(saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass: each storage once, those of ``weights`` not.

    Attributes:
        bytes: As :class:`LiveBytes` counts them.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.bytes = LiveBytes()
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in self._weights:
            self.bytes.add(tensor)
        return tensor


IN_FLOAT32 = (
    (F, "layer_norm", "layer_norm"),
    (F, "group_norm", "group_norm"),
    (F, "rms_norm", "rms_norm"),
    (F, "softmax", "softmax.int"),
    (torch, "softmax", "softmax.int"),
    (Tensor, "softmax", "softmax.int"),
    (F, "interpolate", "upsample_nearest2d"),
)
"""Where a function lies, its name, and the operation of it that autocast computes in float32 on GPUs alone; those of
them whose tensors are large."""


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Make autocast on the CPU hold as much memory as on a GPU.

    Functions are replaced, since a mode of PyTorch's for functions is off in the backward pass, which computes
    checkpointed blocks again.
    """
    originals = [getattr(owner, name) for owner, name, _ in IN_FLOAT32]
    try:
        for (owner, name, _), original in zip(IN_FLOAT32, originals, strict=True):
            setattr(owner, name, in_float32(original))
        yield
    finally:
        for (owner, name, _), original in zip(IN_FLOAT32, originals, strict=True):
            setattr(owner, name, original)


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` that takes its tensors in float32 under autocast."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            arguments, named = tuple(map(as_float32, arguments)), {key: as_float32(v) for key, v in named.items()}
        return function(*arguments, **named)

    return call


def as_float32(value: Any) -> Any:
    """A tensor of floating-point numbers in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
