"""Stand-in tensors, which have a shape and dtype but no values, and counters of memory and FLOPs."""

from __future__ import annotations

import os
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from omegaconf import OmegaConf
from omegaconf.resolvers import oc
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentreward.apps.estimate.pipelines import CLIP_MODELS, HUB_IDS, PIPELINES, write_pipelines
from latentreward.core.errors import InputError
from latentreward.core.peak_rates import Work, complete_flop_formulas, recomputes, work_of
from latentreward.core.running import Phases
from latentreward.core.storage.hub import cached_files, is_hub_id
from latentreward.diffusion.backbones import loading
from latentreward.reward.scorers import clip

CPU = torch.device("cpu")
NUMBERS = {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Dtype → value that ``item()`` of a stand-in returns; 0 for other dtypes."""
RECOMPUTE = "recompute"
"""Phase of the blocks that gradient checkpointing computes again in a backward pass."""
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
"""Operations with a list of index tensors as second argument."""


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
        self.phases = Phases("forward")
        self.work: defaultdict[str, Work] = defaultdict(Work)  # of all operations on stand-ins so far, by phase
        self.rollout_rows = 0  # rows of the rollout that was made, with all candidates kept; 0 without one

    @property
    def flops(self) -> int:
        """FLOPs of all operations on stand-ins so far."""
        return sum(work.flops for work in self.work.values())

    def stand_in(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a new stand-in tensor."""
        tensor = FakeTensor(self._fake, torch.empty(tuple(shape), dtype=dtype, device="meta"), CPU)
        self.live.add(tensor)
        return tensor

    def replace_weights(self, module: nn.Module) -> None:
        """Replace a module's parameters and buffers by stand-ins; a shared tensor gets one shared stand-in."""
        replace_tensors(module, lambda name, old: self.stand_in(old.shape, old.dtype))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation; see :class:`TorchDispatchMode`."""
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
        phase = RECOMPUTE if recomputes() else self.phases.open[-1]
        self.work[phase] += work_of(func, args, kwargs, result)
        for leaf in tree_leaves(result):
            if is_stand_in(leaf):
                self.live.add(leaf)
        return result

    def _nonzero(self, tensor: Tensor) -> Tensor:
        return self.stand_in((tensor.numel(), tensor.ndim), torch.int64) if is_stand_in(tensor) else tensor.nonzero()


def replace_tensors(module: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace all parameters and buffers of a module; one that modules share gets one shared replacement.

    ``make`` gets a tensor's own name, such as ``weight``, and the tensor.
    """
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

    originals = [getattr(owner, name) for owner, name, _ in IN_FLOAT32]
    try:
        for (owner, name, _), original in zip(IN_FLOAT32, originals, strict=True):
            setattr(owner, name, in_float32(original))
        yield
    finally:
        for (owner, name, _), original in zip(IN_FLOAT32, originals, strict=True):
            setattr(owner, name, original)


SOURCES = ("source", "processor", "text_projection_source", "base")
"""Names of settings whose value is a model: a folder or a hub id."""


class ConfigSources:
    """Finder that replaces the models named in settings by local folders with their configs; downloads nothing.

    Configs that ship with the package are written into ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used = dict[str, str]()  # model as named in the settings → origin of its configs, in words
        self._found = set[str]()  # folders that replaced models

    def replace(self, settings: Any) -> None:
        """Replace every model in nested settings, in place."""
        items = vars(settings) if isinstance(settings, Namespace) else settings
        for name, value in list(items.items()):
            if name in SOURCES and isinstance(value, str):
                if unset := re.match(r"<(\w+)>", value):  # as value_or_name writes it
                    raise InputError(
                        f"{name}: the environment variable {unset[1]} is not set, and an estimate reads the configs of "
                        "this model; export it, or give a folder or OWNER/NAME"
                    )
                items[name] = self.find(value, items.get("revision"))
            elif isinstance(value, Namespace | dict):
                self.replace(value)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, Namespace | dict):
                        self.replace(item)

    def find(self, source: str, revision: str | None = None) -> str:
        """Return the folder with the configs of ``source``; a name that is not a hub id is returned unchanged."""
        if source in self._found:
            return source
        if Path(source).exists() or not is_hub_id(source):
            if Path(source).exists():
                self.used[source] = "its folder"
            elif "/" not in source and source not in (*loading.SHIPPED, *clip.SHIPPED):  # an old hub id, such as gpt2
                raise InputError(f"source={source!r} is not a folder; give a folder with its configs, or OWNER/NAME")
            return source
        if (cached := cached_files(source, revision)) is not None:
            self.used[source] = "the local cache of the hub"
            self._found.add(str(cached))
            return str(cached)
        if (kept := HUB_IDS.get(source)) is None:
            raise InputError(
                f"source={source!r} is not in the local cache of the hub, and the package keeps no configs of it; give "
                f"a folder with its configs, or one of {', '.join(HUB_IDS)}"
            )
        self.used[source] = "configs kept in the package"
        if not (self.folder / kept).is_dir():
            write_pipelines(
                self.folder,
                {kept: PIPELINES[kept]} if kept in PIPELINES else {},
                [kept] if kept in CLIP_MODELS else [],
            )
        self._found.add(str(self.folder / kept))
        return str(self.folder / kept)


def value_or_name(name: str, *default: Any) -> Any:
    """Return an environment variable as ``oc.env`` does, or ``<NAME>`` if it is not set and has no default."""
    if default or name in os.environ:
        return oc.env(name, *default)
    return f"<{name}>"  # not $NAME, which is expanded in paths


@contextmanager
def unset_variables() -> Iterator[None]:
    """Allow ``${oc.env:NAME}`` of unset environment variables in settings: an estimate does not read these paths."""
    replace = partial(OmegaConf.register_resolver, "oc.env", replace=True)
    replace(value_or_name)
    try:
        yield
    finally:
        replace(oc.env)
