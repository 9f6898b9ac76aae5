"""Atomic writes of checkpoint files, and the choice of the checkpoint to resume from."""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from latentreward.core.checkpoints.shards import (
    INDEX,
    REST,
    UNREADABLE,
    check_values,
    damaged,
    newest_first,
    read_sharded,
)
from latentreward.core.errors import InputError, fault_of, first_line
from latentreward.core.storage.durable import replacing

logger = logging.getLogger(__name__)


def kept_beside(path: Path) -> str:
    """Return the end of the error message on a full disk, after the name of the checkpoint at ``path``."""
    if any(path.parent.glob("*.ckpt")):
        return "the checkpoints written before are kept: free some space and go on with --ckpt_path last"
    return "no checkpoint was written before it: free some space and start the run again"


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes to a temporary file, syncs it to disk, and only then renames it to its final name.

    A kill or a power loss at any moment leaves the complete old file or the complete new one; Lightning's own plugin
    does not wait for the disk. The command line uses this plugin; in Python, pass
    ``Trainer(plugins=[DurableCheckpointIO()])``. It also reads sharded checkpoints, for strategies that do not shard.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path`` after :func:`check_states`; Lightning's own code writes to a URL (``s3://``)."""
        check_states(checkpoint)
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path), kept_beside(Path(path))) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read the checkpoint at ``path``; ``weights_only`` is always taken as True, so that it cannot run code."""
        if Path(path).is_dir():
            return read_sharded(Path(path))
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        if problem := checkpoint_problem(Path(path)):
            raise InputError(damaged(path, problem))
        # Mapped into memory, so that evaluation does not read the optimiser's state.
        content = torch.load(path, map_location, weights_only=True, mmap=True)
        if isinstance(content, dict) and {"optimizer_states", "state_dict"} <= content.keys():
            # The weights get a mapping of their own, which ends once they are copied into the model. On a CPU the
            # optimiser goes on with the mapped tensors of its state, which would keep the weights' pages in memory too.
            content["state_dict"] = torch.load(path, map_location, weights_only=True, mmap=True)["state_dict"]
        return content


def wrap_saving(strategy: Strategy, wrapper: Callable[..., None], *given: Any) -> None:
    """Let a strategy save checkpoints by ``wrapper(*given, save, checkpoint, ...)``; ``save`` is what it did before.

    A wrapper with the same first argument is dropped: Lightning calls no teardown of a fit that an error ends.
    """

    def without(save: Any) -> Any:
        if not isinstance(save, partial):
            return save
        *settings, inner = save.args
        same = save.func is wrapper and settings[0] is given[0]
        return without(inner) if same else partial(save.func, *settings, without(inner))

    strategy.save_checkpoint = partial(wrapper, *given, without(strategy.save_checkpoint))  # type: ignore[method-assign]


def check_states(checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError for the first state that cannot be saved, or not be loaded again without running code."""
    for name, state in {**checkpoint, "callbacks": None, **checkpoint.get("callbacks", {})}.items():
        stream = BytesIO()
        try:
            torch.save(tree_map_only(torch.Tensor, lambda _: None, state), stream)
            stream.seek(0)
            torch.load(stream, weights_only=True)
        except Exception as error:  # whatever a class of the user's raises as it is pickled
            raise InputError(
                f"the state of {name} cannot be resumed ({first_line(error)}); let it hold tensors and plain values"
            ) from error


def checkpoint_problem(path: Path, values: bool = True) -> str | None:
    """Describe in one line why a checkpoint, a file or folder of shards, cannot be read, or return None.

    ``values`` are compared with their checksums, which reads all of them.
    """
    missing = [name for name in (INDEX, REST) if path.is_dir() and not (path / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        if path.is_dir():
            read_sharded(path, with_tensors=False)
        else:
            torch.load(path, map_location="meta", weights_only=True, mmap=True)
        if values:
            check_values(path)
    except (*UNREADABLE, OSError) as error:
        return fault_of(error)
    return None


def holds_weights_alone(path: Path) -> bool:
    """Tell whether an intact file is a Lightning checkpoint without state of an optimiser (``save_weights_only``)."""
    content = torch.load(path, "meta", weights_only=True, mmap=True) if path.is_file() else None
    ours = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    return ours and "optimizer_states" not in content


def newest_intact(candidates: Iterable[Path]) -> Path | None:
    """Return the newest of ``candidates``; None if none of them exists.

    If it is damaged, return the newest intact checkpoint beside the candidates that a run can resume from, and warn.
    """
    found = newest_first(path for path in candidates if path.exists())
    if not found:
        return None
    problem = checkpoint_problem(found[0])
    if problem is None:
        return found[0]
    for path in newest_first({path for folder in {path.parent for path in found} for path in folder.glob("*.ckpt")}):
        if path != found[0] and checkpoint_problem(path) is None and not holds_weights_alone(path):
            logger.warning("ckpt_path: %s is damaged (%s); going on from the previous one, %s", found[0], problem, path)
            return path
    raise InputError(
        f"ckpt_path: {found[0]} is damaged ({problem}), and no checkpoint beside it is intact; remove it to start anew"
    )
