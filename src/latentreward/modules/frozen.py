"""Frozen weights of a run on several processes: compared once, and held once per machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latentreward.checkpoints.base_weights import is_quantized
from latentreward.checkpoints.shards import frozen_names
from latentreward.errors import InputError
from latentreward.storage.digests import digest
from latentreward.storage.shared_weights import release_shared

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def share_frozen(module: LightningModule, trainer: Trainer) -> None:
    """Check that all ranks have loaded the same frozen weights, and keep DDP from sending them.

    At its start DDP writes the weights of rank 0 into those of the other ranks. Of weights that are mapped from a file,
    each process would then get a copy of its own. A digest is compared instead. The module must not be wrapped or
    sharded yet.

    Raises:
        InputError: On all ranks, if a rank has other frozen weights than rank 0.
    """
    if trainer.world_size == 1:
        release_shared(remove=True)
        return
    names = frozen_names(module)
    found = digest(frozen_values(module, names))
    strategy = trainer.strategy
    if not strategy.reduce_boolean_decision(found == strategy.broadcast(found), all=True):
        raise InputError(
            "the ranks have loaded different frozen weights; give all machines the same files of the base models"
        )
    release_shared(remove=trainer.local_rank == 0)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def refuse_quantized(module: nn.Module, strategy: str) -> None:
    """Raise InputError if a parameter is quantised, which the named strategy cannot shard."""
    for name, parameter in module.named_parameters():
        if is_quantized(parameter):
            raise InputError(
                f"parameter {name} is quantised, which {strategy} cannot shard; use ddp, or no quantization"
            )


def frozen_values(module: nn.Module, names: set[str]) -> Iterator[memoryview | str]:
    """Yield names and bytes of the named parameters and buffers of a module, in the module's order."""
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if name in names:
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            for part in stored_parts(tensor.detach()):
                yield memoryview(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def stored_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors in which a tensor is stored: itself, or codes and scales of torchao's quantised ones."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    yield from [getattr(tensor, name) for name in names] or [tensor]
