"""Lightning strategies: FSDP2 over all processes, with checkpoints that load anywhere."""

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

from latentreward.checkpoints.files import KEPT
from latentreward.checkpoints.shards import (
    UNREADABLE,
    check_weights,
    damaged,
    is_sharded,
    named,
    numbered,
    read_sharded,
    shard_index,
)
from latentreward.errors import InputError, errors_at, first_line
from latentreward.storage.durable import discard, put_in_place, temporary_name, write_errors_named


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimiser state shared out over all processes (PyTorch's ``fully_shard``), GPUs or CPUs.

    Lightning's ``ModelParallelStrategy`` with three differences: the data-parallel axis spans every process without
    being told; a single-file checkpoint is the same as that of DDP or of one device, and loads under either; a
    checkpoint that lacks a weight is refused by the weight's name. A folder of shards gets its name when it is whole.

    Args:
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each process writes its share (fast,
            little memory; ``latentreward consolidate`` makes one file of it) or one file, put together on rank 0.
        process_group_backend: None takes ``nccl`` on GPUs and ``gloo`` on CPUs.

    Note:
        Lightning 2.6 numbers the parameters of a single file's optimiser in the module's order, PyTorch in that of the
        optimiser's groups; between FSDP2 and anything else the moments would go to other weights without a word.

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
        target = Path(self.broadcast(filepath))  # Lightning would write over the shards of an older one, file by file
        partial = Path(self.broadcast(temporary_name(target)))
        try:
            with write_errors_named(target, KEPT):
                super().save_checkpoint(checkpoint, partial, storage_options)
                self.barrier()
                if self.is_global_zero:
                    put_in_place(partial, target)
                self.barrier()
        finally:
            if self.is_global_zero:
                discard(partial)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if not path.exists():  # fetched from an address: each node has its own copy
            path = Path(checkpoint_path)
        if is_sharded(path):
            entries = {name.partition("."): entry for name, entry in shard_index(path).state_dict_metadata.items()}
            sizes = {
                name: getattr(entry, "size", ()) for (part, _, name), entry in entries.items() if part == "state_dict"
            }
            self._check(path, sizes)
            read_sharded(path, with_tensors=False)  # Lightning's own reader would run what a pickle there says
            return super().load_checkpoint(path, weights_only=True)
        try:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except UNREADABLE as error:
            raise InputError(damaged(path, first_line(error))) from error
        self._check(path, {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()})
        options = StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, strict=self.lightning_module.strict_loading
        )
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            if state["state"]:
                set_optimizer_state_dict(self.model, optimizer, named(state, optimizer, self.model), options=options)
            else:  # of plain SGD, which PyTorch's function refuses
                optimizer.load_state_dict(state)
        return checkpoint

    def _check(self, path: Path, found: dict[str, torch.Size]) -> None:
        with errors_at(f"ckpt_path: {path}: "):
            check_weights(self.model, found, self.lightning_module.strict_loading)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2; a checkpoint is one file")
StrategyRegistry.register(
    "fsdp2_sharded", FSDP2Strategy, description="FSDP2; a checkpoint is a folder", save_distributed_checkpoint=True
)
