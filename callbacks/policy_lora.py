"""The LoRA of a policy in training, ready for diffusers."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from latentreward.errors import InputError, errors_at
from latentreward.export import TrainedLoRA
from latentreward.modules.alignment import AlignmentModule


class PolicyLoRA(Callback):
    """Write the policy's adapter as a LoRA whenever a checkpoint is saved, and at the end of training.

    The folder ``lora`` of the run's log folder holds the newest; ``pipeline.load_lora_weights`` of diffusers takes it.
    The file there is the old one or the new one at any moment, whole. It holds the weights that train, not the average
    of ``TrainableEMA``; for that, ``latentreward consolidate --average=true`` and then ``latentreward export``.

    Args:
        folder: Another folder.

    Raises:
        InputError: If the run trains no policy.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks+:
                - class_path: PolicyLoRA
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._written: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without a policy."""
        if not isinstance(pl_module, AlignmentModule):
            raise InputError(f"PolicyLoRA: a {type(pl_module).__name__} has no policy; use it in alignment alone")

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self.folder or Path(trainer.log_dir or ".") / "lora"  # asks all ranks, as the next line does
        with errors_at(f"optimiser step {trainer.global_step}: "):
            lora = TrainedLoRA.of_policy(pl_module.policy)
        if trainer.is_global_zero:
            lora.write_diffusers(folder)
        self._written = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the weights that the checkpoint gets."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what training ended with, unless the last checkpoint did."""
        if self._written != trainer.global_step:
            self._write(trainer, pl_module)
