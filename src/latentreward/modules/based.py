"""Training on top of a base: what trains stays float32, and checkpoints say which base their weights belong to."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import AdamW

from latentreward.checkpoints.base_weights import BaseSample
from latentreward.errors import InputError
from latentreward.modules.optimizers import single_optimizer
from latentreward.seeding import run_seed


class BasedModule(LightningModule):
    """Weights that train on top of a frozen base.

    Derived classes set :attr:`based_on` in their constructor.

    Args:
        optimizer: Gets the parameters that train; vectors among them, unless the module says otherwise, without weight
            decay.
        lr_scheduler: Counted in optimiser steps; None keeps the rate constant.
        seed: Seed of every draw; None takes the run's ``seed_everything``.

    Attributes:
        based_on: What holds the base's weights, and where they come from.
        lr: Learning rate in place of the optimiser's own; None keeps that. Lightning's learning rate finder sets it.
        frozen_dtype: Name of the setting that stores frozen weights in bfloat16, for messages.
    """

    based_on: tuple[nn.Module, str]
    frozen_dtype = "frozen_dtype"
    decay_vectors = False

    def __init__(
        self,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler, self.seed = optimizer, lr_scheduler, run_seed(seed)
        self.lr: float | None = None
        self._configured_lr: float | None = None
        self._base: BaseSample | None = None

    def setup(self, stage: str) -> None:
        """Refuse a precision under which small updates of the weights would be lost.

        Raises:
            InputError: If it is not 32-true, 16-mixed or bf16-mixed.
        """
        if self.trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
            raise InputError(
                f"trainer.precision={self.trainer.precision}: what trains must be float32; use bf16-mixed (with "
                f"{self.frozen_dtype}: bfloat16 for the frozen weights), 16-mixed or 32-true"
            )
        if self._base is None:  # while weights are whole
            self._base = BaseSample.of(*self.based_on)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that belongs to another base."""
        if self._base is not None and "base" in checkpoint:
            self._base.check(checkpoint["base"])

    def configure_optimizers(self) -> Any:
        """One optimiser over what trains; its schedule steps with it."""
        self._configured_lr = self.lr
        return single_optimizer(self.parameters(), self.optimizer, self.lr_scheduler, self.decay_vectors, self.lr)

    def on_fit_start(self) -> None:
        """Make the optimiser again if the callback ``LearningRateFinder`` has found a rate for it.

        Lightning tells the optimiser alone; a schedule made before would bring back the old rate at its next step.
        """
        if self.lr != self._configured_lr:
            self.trainer.strategy.setup_optimizers(self.trainer)
