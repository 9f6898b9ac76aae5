"""Reading of checkpoints: one file, or a folder to which each process wrote its shards (PyTorch's distributed format).

A file and a folder of shards give equal dictionaries. Only tensors and plain values are read, so that a checkpoint
cannot run code.
"""

from __future__ import annotations

# Functions import torch.distributed where they need it: it takes a second, and commands such as `score` do without.
import pickle
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from latentreward.core.checkpoints.base_weights import is_quantized, quantized_names
from latentreward.core.errors import InputError, fault_of, first_line
from latentreward.core.storage.digests import Places, check_hash, check_records

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

INDEX, REST = ".metadata", "meta.pt"
"""Files of a sharded checkpoint: the index of tensors, and the values that are not sharded."""
INDEX_HASH = ".metadata.sha256"
"""File with the SHA-256 of the index; shards that Lightning's own strategies wrote have none."""
UNREADABLE = (
    RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, OverflowError,
    MemoryError, pickle.UnpicklingError, struct.error, SafetensorError,
)  # fmt: skip
"""Exceptions that PyTorch's readers raise for bytes that are not a checkpoint."""


def is_sharded(path: Path) -> bool:
    """Tell whether ``path`` is the folder of a sharded checkpoint."""
    return (path / INDEX).is_file() and (path / REST).is_file()


def shard_index(path: Path) -> Metadata:
    """Read the index of a sharded checkpoint: shape and dtype of each tensor, by name; it cannot run code."""
    if not is_sharded(path):
        problem = f"is a folder without {INDEX} and {REST}; give a file, or all files of a sharded checkpoint"
        if inside := newest_first(found for found in path.rglob("*.ckpt") if found.exists()):
            problem = f"is the folder of a run; give a checkpoint in it, such as {inside[0]}"
        raise InputError(f"checkpoint: {path} {problem}")
    from latentreward.core.checkpoints.shard_reader import ShardReader

    try:
        if (path / INDEX_HASH).is_file():  # the index has no checksum of its own
            check_hash(path / INDEX, (path / INDEX_HASH).read_text(), "give another checkpoint")
        return ShardReader(path).read_metadata()
    except UNREADABLE as error:
        raise InputError(damaged(path, first_line(error))) from error


def check_values(path: Path) -> None:
    """Compare the values in a checkpoint with its checksums; raises ValueError or OSError if it is damaged."""
    for file, places in files_of(path):
        check_records(file, places)


def files_of(path: Path) -> list[tuple[Path, Places | None]]:
    """List the files that hold a checkpoint's values, with offset and bytes of each part of a shard."""
    if not path.is_dir():
        return [(path, None)]
    places: dict[str, set[tuple[int, int]]] = {}
    for entry in shard_index(path).storage_data.values():
        places.setdefault(entry.relative_path, set()).add((entry.offset, entry.length))
    return [*((path / name, tuple(sorted(found))) for name, found in places.items()), (path / REST, None)]


def read_sharded(path: Path, with_tensors: bool = True) -> dict[str, Any]:
    """Read a sharded checkpoint completely into memory, as the dictionary that a single file would hold.

    Without ``with_tensors``, tensors are on the meta device: a quick check that all else is plain values, so that
    loading the checkpoint runs no code.
    """
    from torch.distributed import checkpoint as distributed_checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from latentreward.core.checkpoints.shard_reader import PlainValues, ShardReader

    index = shard_index(path)
    device = "cpu" if with_tensors else "meta"
    flat: dict[str, Any] = {}
    unread: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    try:
        if with_tensors:
            check_values(path)
        for name, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                empty = torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
                (flat if with_tensors else unread)[name] = empty
            else:
                flat[name] = None
        if flat:
            planner = PlainValues(flatten_state_dict=False, flatten_sharded_tensors=False)
            with warnings.catch_warnings():  # torch warns that there is only one process
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                distributed_checkpoint.load(flat, storage_reader=ShardReader(path), planner=planner, no_dist=True)
        rest = torch.load(path / REST, map_location=device, weights_only=True, mmap=True)
        for name, value in (flat | unread).items():
            *parents, last = index.planner_data[name]
            place = nested
            for key in parents:
                place = place.setdefault(key, {})
            place[last] = value
        optimizers = sorted(key for key in nested if key.startswith("optimizer_"))
        states = [numbered(listed(nested[key])) for key in optimizers] if with_tensors else []
        return {**rest, "state_dict": nested.get("state_dict", {}), "optimizer_states": states}
    except (*UNREADABLE, OSError, distributed_checkpoint.CheckpointException) as error:
        raise InputError(damaged(path, fault_of(error))) from error


def read_checkpoint(path: Path, with_tensors: bool = True) -> dict[str, Any]:
    """Read a checkpoint, sharded or in one file, as a dictionary on the CPU.

    Without ``with_tensors``, no values are read or compared with checksums: tensors are on the meta device.
    """
    if not path.exists():
        raise InputError(f"checkpoint: {path} does not exist")
    try:
        if path.is_dir():
            content = read_sharded(path, with_tensors)
        else:
            if with_tensors:
                check_values(path)
            # Mapped into memory, so that the optimiser's state is not read.
            content = torch.load(path, "cpu" if with_tensors else "meta", weights_only=True, mmap=True)
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, InputError):  # it names the fault
            raise
        raise InputError(damaged(path, fault_of(error))) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise InputError(f"checkpoint: {path} is not a Lightning checkpoint; give one that `fit` wrote")
    return content


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort paths by the time of their last modification, newest first."""
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def damaged(path: str | Path, problem: str) -> str:
    """Return the error message for a checkpoint that cannot be read."""
    return (
        f"checkpoint {path} is damaged, or holds more than tensors and plain values and could run code "
        f"({problem}); give a checkpoint that this program wrote"
    )


def listed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Restore the list of parameter groups in an optimiser's state, which the shards hold as a mapping by index."""
    groups = state["param_groups"]
    if isinstance(groups, Mapping):
        groups = [groups[number] for number in sorted(groups)]
    return {"state": state.get("state", {}), "param_groups": groups}


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an optimiser's state keyed by parameter names to one keyed by indices, as PyTorch's optimisers have."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number[name]: entry for name, entry in state["state"].items()}, "param_groups": groups}


def named(state: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Convert a state keyed by indices, for ``optimizer``, to one keyed by the names of ``module``'s parameters."""
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    names = [[name_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if [len(group["params"]) for group in state["param_groups"]] != [len(group) for group in names]:
        raise InputError("the checkpoint's optimiser has other parameters; tuning and head must be as in training")
    by_number = {
        number: name
        for group, own in zip(state["param_groups"], names, strict=True)
        for number, name in zip(group["params"], own, strict=True)
    }
    groups = [{**group, "params": own} for group, own in zip(state["param_groups"], names, strict=True)]
    return {"state": {by_number[number]: entry for number, entry in state["state"].items()}, "param_groups": groups}


def frozen_names(module: nn.Module) -> set[str]:
    """List the state-dict entries that training never changes: of frozen parameters, and buffers of frozen modules.

    A module counts as frozen for its buffers if none of its own parameters is trained and its attribute
    ``changes_buffers``, or that of the nearest module around it which has one, is not true.
    """
    changes = changing_names(module)
    homes = {name.rpartition(".")[0] for name in changes} | set(_changing_buffers(module))
    every = module.named_parameters(remove_duplicate=False)  # tied weights have several names in a state dict
    frozen = {name for name, parameter in every if not parameter.requires_grad and name not in changes}
    frozen |= {name for name, _ in module.named_buffers() if name.rpartition(".")[0] not in homes}
    return frozen | quantized_names(module)


def _changing_buffers(module: nn.Module, name: str = "", around: bool = False) -> Iterator[str]:
    changes = getattr(module, "changes_buffers", around)
    if changes:
        yield name
    for child, part in module.named_children():
        yield from _changing_buffers(part, f"{name}.{child}" if name else child, changes)


def changing_names(module: nn.Module) -> set[str]:
    """List the parameters that training changes: those with a gradient, and those of ``moving_adapters``.

    A module's attribute ``moving_adapters`` names adapters without gradient that follow the trained one.
    """
    marks = {f".{name}." for part in module.modules() for name in getattr(part, "moving_adapters", ())}
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or any(mark in name for mark in marks)
    }


def check_weights(module: nn.Module, found: Mapping[str, Any], strict: bool = False) -> None:
    """Compare the names and shapes ``found`` in a checkpoint with a module's; ``strict`` wants frozen weights too."""
    own = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers()))
    trains = changing_names(module)
    missing = (trains | module.state_dict().keys() if strict else trains) - found.keys()
    unknown = found.keys() - own.keys() - module.state_dict().keys()
    reshaped = sorted(name for name in found.keys() & own.keys() if tuple(found[name]) != tuple(own[name].shape))
    problems = [
        f"{kind} {sorted(names)[0]} ({len(names)} in all)"
        for kind, names in (("it lacks", missing), ("it has the unknown weight", unknown))
        if names
    ]
    if reshaped:
        name, theirs, ours = reshaped[0], tuple(found[reshaped[0]]), tuple(own[reshaped[0]].shape)
        problems.append(f"{name} has shape {theirs}, not {ours} ({len(reshaped)} in all)")
    if problems:
        only_frozen = not (unknown or reshaped or missing & trains)
        remedy = "add TrainableCheckpoint to trainer.callbacks if it holds only weights that train"
        same = "backbone, tuning and head must be those it was trained with"
        raise InputError(f"the checkpoint does not fit: {', '.join(problems)}; {remedy if only_frozen else same}")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, or None; quantised ones are not read.

    Of a sharded tensor, this rank's shard is checked.
    """
    from torch.distributed.tensor import DTensor

    for name, tensor in tensors.items():
        values = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if is_quantized(values) or not values.is_floating_point() or values.is_meta or not values.numel():
            continue
        values = values.float() if values.itemsize == 1 else values  # aminmax does not support 8-bit floats
        # Both are finite if and only if all values are. isfinite on the tensor itself would be 30 times as slow on a
        # CPU, and the sum of finite 16-bit values may overflow.
        if not torch.stack(torch.aminmax(values)).isfinite().all():
            return name
    return None


def require_finite(tensors: Mapping[str, Tensor], owner: str) -> None:
    """Raise InputError if ``owner``, for example a checkpoint's path, holds a tensor that is not finite."""
    if name := not_finite(tensors):
        raise InputError(f"{owner}: {name} is not finite; take a checkpoint from before its training went wrong")


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a detached copy of a tensor on the CPU; a tensor sharded over ranks is gathered in a collective call."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().to("cpu", copy=True)


def placed_like(whole: Tensor, like: Tensor) -> Tensor:
    """Copy ``whole``, which every rank holds, to float32, with the device and the sharding over ranks of ``like``."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = whole.to(like.device, torch.float32, copy=True)
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
