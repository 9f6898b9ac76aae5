"""Learning-rate schedules, in optimiser steps."""

import math
from typing import Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from latentreward.errors import InputError, did_you_mean

NEVER = 2**62
"""Frequency, in epochs, at which Lightning steps a ReduceLROnPlateau: :class:`PlateauSteps` does it instead."""
Decay = Literal["none", "linear", "cosine"]


class WarmupSchedule(LambdaLR):
    """Learning rate schedule: linear warm-up, then constant, or decay to 0 at ``total_steps``.

    Args:
        optimizer: Optimiser whose learning rate is scheduled.
        warmup_steps: Optimiser steps until the full rate.
        decay: ``none``, ``linear`` or ``cosine``.
        total_steps: Optimiser steps of the run, needed for a decay: ``"${trainer.max_steps}"`` in YAML.

    Raises:
        InputError: If ``decay`` is unknown, ``warmup_steps`` negative, or a decay has no ``total_steps`` beyond the
            warm-up.

    Note:
        LRM's released schedule counts a step per process and so is nearly constant after warm-up on 8 GPUs; this one
        counts optimiser steps, whatever the number of processes or accumulated batches.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        decay: Decay = "none",
        total_steps: int | None = None,
    ) -> None:
        if decay not in get_args(Decay):
            raise InputError(f"decay={decay!r} is not known{did_you_mean(str(decay), get_args(Decay))}")
        if warmup_steps < 0:
            raise InputError(f"warmup_steps={warmup_steps} must be at least 0")
        if decay != "none" and (total_steps is None or total_steps <= warmup_steps):
            raise InputError(
                f"decay={decay!r} needs total_steps above warmup_steps={warmup_steps}, got {total_steps}; "
                'give the run\'s length, e.g. total_steps: "${trainer.max_steps}"'
            )
        self.warmup_steps, self.decay, self.total_steps = warmup_steps, decay, total_steps
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "none":
            return 1.0
        left = max(0.0, 1.0 - (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return left if self.decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


class PlateauSteps(Callback):
    """Callback that steps a ReduceLROnPlateau with its metric after each validation, before checkpoints are saved.

    Lightning steps it after the checkpoint of an epoch's end, so that a resumed run would lack that step.

    Raises:
        InputError: If the validation logs no metric of that name.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedules that follow a metric; a sanity check only looks for the metric."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau:
                if (metric := trainer.callback_metrics.get(str(config.monitor))) is None:
                    known = ", ".join(sorted(trainer.callback_metrics))
                    raise InputError(
                        f"model.lr_scheduler.monitor: {config.monitor} is not one of the validation's metrics: {known}"
                    )
                if not trainer.sanity_checking:
                    config.scheduler.step(metric)
