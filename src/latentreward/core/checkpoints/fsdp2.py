"""Lightning strategies for FSDP2 over all processes, with checkpoints that also load under other strategies."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from typing_extensions import override

from latentreward.core.checkpoints.files import check_states, kept_beside
from latentreward.core.checkpoints.shards import (
    INDEX,
    INDEX_HASH,
    UNREADABLE,
    check_values,
    check_weights,
    damaged,
    is_sharded,
    named,
    numbered,
    read_sharded,
    shard_index,
)
from latentreward.core.errors import InputError, errors_at, fault_of
from latentreward.core.storage.digests import file_hash
from latentreward.core.storage.durable import discard, put_in_place, temporary_name, write_errors_named


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 strategy: weights, gradients and optimiser state are sharded over all processes (``fully_shard``).

    It runs on GPUs or CPUs. Unlike Lightning's ``ModelParallelStrategy``, a single-file checkpoint has the format
    of DDP and of one device, and loads under either; one that lacks a weight is refused with the weight's name; and a
    folder of shards is written under a temporary name and renamed when it is complete.

    Args:
        save_distributed_checkpoint: True saves a folder to which each process writes its shards (fast, little memory;
            ``latentreward consolidate`` turns the folder into one file). False saves one file, gathered on rank 0.
        process_group_backend: Backend of ``torch.distributed``; None takes ``nccl`` on GPUs and ``gloo`` on CPUs.

    Note:
        In a single file, Lightning 2.6 numbers the optimiser's parameters in the order of the module, but PyTorch in
        the order of the optimiser's groups. Without the conversion here, a checkpoint that moves between FSDP2 and
        another strategy would silently assign Adam's moments to other weights.

    Example:
        ``--trainer.strategy=fsdp2`` or ``--trainer.strategy=fsdp2_sharded``.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise InputError(f"trainer.precision={trainer.precision}: FSDP2 takes bf16-mixed or 32-true")
        super().setup(trainer)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, getattr(optimizer, "optimizer", optimizer), options=options)
        return numbered(state) if self.is_global_zero else {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        check_states(checkpoint)
        # A temporary folder first: Lightning would overwrite an older checkpoint's shards file by file.
        target = Path(self.broadcast(filepath))
        partial = Path(self.broadcast(temporary_name(target)))
        try:
            with write_errors_named(target, kept_beside(target)):
                super().save_checkpoint(checkpoint, partial, storage_options)
                self.barrier()
                if self.is_global_zero:
                    (partial / INDEX_HASH).write_text(file_hash(partial / INDEX))
                    put_in_place(partial, target)
                self.barrier()
        finally:
            if self.is_global_zero:
                discard(partial)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if sharded := is_sharded(path):
            entries = {name.partition("."): entry for name, entry in shard_index(path).state_dict_metadata.items()}
            sizes = {
                name: getattr(entry, "size", ()) for (part, _, name), entry in entries.items() if part == "state_dict"
            }
            self._check(path, sizes)
            read_sharded(path, with_tensors=False)  # checked first: Lightning's own reader unpickles and could run code
        try:
            check_values(path)
            checkpoint = {} if sharded else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (*UNREADABLE, OSError) as error:
            raise InputError(damaged(path, fault_of(error))) from error
        if sharded:
            return super().load_checkpoint(path, weights_only=True)
        self._check(path, {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()})
        options = StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, strict=self.lightning_module.strict_loading
        )
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            if state["state"]:
                set_optimizer_state_dict(self.model, optimizer, named(state, optimizer, self.model), options=options)
            else:  # plain SGD has no state, which set_optimizer_state_dict refuses
                optimizer.load_state_dict(state)
        return checkpoint

    def _check(self, path: Path, found: dict[str, torch.Size]) -> None:
        with errors_at(f"ckpt_path: {path}: "):
            check_weights(self.model, found, self.lightning_module.strict_loading)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2; a checkpoint is one file")
StrategyRegistry.register(
    "fsdp2_sharded", FSDP2Strategy, description="FSDP2; a checkpoint is a folder", save_distributed_checkpoint=True
)
