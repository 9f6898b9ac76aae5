"""Callback that writes a policy's LoRA for diffusers during training."""

from pathlib import Path
from typing import Any

from latentreward.callbacks.resumed_settings import output_path
from lightning.pytorch import Callback, LightningModule, Trainer

from latentreward.alignment import AlignmentModule, TrainedLoRA
from latentreward.core.checkpoints.files import wrap_saving
from latentreward.core.errors import InputError, errors_at


class PolicyLoRA(Callback):
    """Callback that writes the policy's adapter as a LoRA with each checkpoint and at the end of training.

    The folder ``lora`` of the run's log folder holds the newest LoRA, or ``lora-v1`` if an earlier run wrote ``lora``.
    ``pipeline.load_lora_weights`` of diffusers loads it, or peft where diffusers has no LoRA loader for the family. The
    file is replaced at once, so a reader always finds a complete one. The LoRA holds the trained weights, not the
    average of ``TrainableEMA``; for the average, run ``latentreward consolidate --average=true`` and then
    ``latentreward export``.

    Args:
        folder: Folder to write to; None takes ``lora`` in the run's log folder.

    Example:
        ``--trainer.callbacks+=PolicyLoRA``
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.output_name = Path("lora") if folder is None else folder.absolute()
        self._written: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the LoRA after each checkpoint, so that a kill leaves none that is ahead of the checkpoints.

        Lightning has no hook after a checkpoint, so the strategy's method that writes it is wrapped.
        """
        if not isinstance(pl_module, AlignmentModule):
            raise InputError(f"PolicyLoRA: a {type(pl_module).__name__} has no policy; use it in alignment alone")
        wrap_saving(trainer.strategy, save_both, self, trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the strategy its own method back."""
        vars(trainer.strategy).pop("save_checkpoint", None)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the LoRA of the present weights; collective."""
        folder = output_path(trainer, self.output_name)  # a collective call
        with errors_at(f"optimiser step {trainer.global_step}: "):
            lora = TrainedLoRA.of_policy(pl_module.policy)
        if trainer.is_global_zero:
            lora.write(folder)
        self._written = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the LoRA of the checkpoint that a run is resumed from, which a kill may have left without its own."""
        if trainer.ckpt_path:
            self.write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the LoRA at the end, also of a run that was complete, unless one of this optimiser step is written."""
        if self._written != trainer.global_step:
            self.write(trainer, pl_module)


def save_both(
    callback: PolicyLoRA, trainer: Trainer, pl_module: LightningModule, save: Any, *args: Any, **options: Any
) -> None:
    """Write a checkpoint by ``save``, and then the LoRA."""
    save(*args, **options)
    callback.write(trainer, pl_module)
