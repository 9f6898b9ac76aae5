"""Training on top of a base: what trains stays float32, and checkpoints say which base their weights belong to."""

from typing import Any, Self

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import AdamW

from latentreward.checkpoints.base_weights import BaseSample
from latentreward.checkpoints.shards import check_weights, frozen_names
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

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, weights_only: bool = True, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a module, built from ``kwargs``, with a checkpoint's weights; see ``LightningModule``.

        By default nothing but tensors and plain values is read, where Lightning would unpickle anything.
        """
        return super().load_from_checkpoint(checkpoint_path, weights_only=weights_only, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that belongs to another base.

        Outside a Trainer, where ``load_from_checkpoint`` calls this, frozen weights that the checkpoint leaves out stay
        those of the base, which is the same one.
        """
        if "base" in checkpoint:
            (self._base or BaseSample.of(*self.based_on)).check(checkpoint["base"])
        try:
            _ = self.trainer
        except RuntimeError:
            check_weights(self, {name: value.shape for name, value in checkpoint["state_dict"].items()})
            frozen, state = frozen_names(self), self.state_dict()
            left_out = {name: state[name] for name in state.keys() & frozen} if "base" in checkpoint else {}
            checkpoint["state_dict"] = {**left_out, **checkpoint["state_dict"]}

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
