"""A module's optimiser and learning rate schedules, stepped after each optimiser step, and checks of its steps."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from latentreward.core.errors import InputError, check_choices, check_range

NEVER = 2**62
"""Frequency, in epochs, at which Lightning steps a ReduceLROnPlateau: :class:`OptimizerSteps` does it instead."""
Decay = Literal["none", "linear", "cosine"]


def single_optimizer(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    decay_vectors: bool = False,
    lr: float | None = None,
) -> Any:
    """Build one optimiser over the trainable parameters and its schedule, as ``configure_optimizers`` returns them.

    The schedule is stepped after each optimiser step. With ``decay_vectors``, vectors and scalars (biases, norms) get
    the optimiser's weight decay too. ``lr`` is the learning rate before any schedule; None keeps the optimiser's own.

    Raises:
        InputError: If the optimiser refuses its settings, or a ReduceLROnPlateau has no ``monitor``.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # AdamW decays every parameter of a group; norms, biases and a temperature have no reason to shrink to 0.
    groups: list[dict[str, Any]] = [
        {"params": [one for one in trained if one.ndim > 1 or decay_vectors]},
        {"params": [one for one in trained if not (one.ndim > 1 or decay_vectors)], "weight_decay": 0.0},
    ]
    try:
        built = optimizer([group for group in groups if group["params"]])
    except ValueError as error:
        raise InputError(f"model.optimizer: {error}") from error
    for group in built.param_groups:
        group["lr"] = group["lr"] if lr is None else lr
    if lr_scheduler is None:
        return built
    schedule: dict[str, Any] = {"scheduler": lr_scheduler(built), "interval": "step"}
    if isinstance(schedule["scheduler"], ReduceLROnPlateau):
        if not hasattr(schedule["scheduler"], "monitor"):
            raise InputError(
                "model.lr_scheduler: ReduceLROnPlateau of torch has no monitor; take "
                "lightning.pytorch.cli.ReduceLROnPlateau, with monitor: val/accuracy and mode: max, for example"
            )
        # Lightning steps it after the checkpoint of an epoch is written; a resumed run would lack that step.
        schedule |= {"monitor": schedule["scheduler"].monitor, "interval": "epoch", "frequency": NEVER}
    return {"optimizer": built, "lr_scheduler": schedule}


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
        self, optimizer: Optimizer, warmup_steps: int = 0, decay: Decay = "none", total_steps: int | None = None
    ) -> None:
        check_choices(WarmupSchedule, decay=decay)
        check_range("[0, inf)", warmup_steps=warmup_steps)
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


class OptimizerSteps(Callback):
    """Callback of every module: checks and logs its optimiser's steps, and steps a ReduceLROnPlateau.

    Logs ``train/lr`` and ``train/grad_norm``, the norm of all gradients before they are clipped. FSDP1, which shards
    gradients without their shapes, has no norm and no warning of weights without a gradient.
    """

    def __init__(self) -> None:
        self._stepped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rebuild the optimiser and its schedule if ``LearningRateFinder`` has found a learning rate.

        Lightning sets the new rate in the optimiser only; the old schedule would set the old rate at its next step.
        """
        if pl_module.lr != pl_module.configured_lr:
            trainer.strategy.setup_optimizers(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise InputError for a loss without a gradient, of which PyTorch names no part."""
        if not loss.requires_grad:
            raise InputError(
                f"{type(pl_module).__name__}.training_step returned a loss without a gradient; nothing that is "
                "computed from trained weights may be detached (in a family of your own: velocity, begin and step)"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the learning rate and the norm of logged steps; in the first step, warn of unreached weights."""
        if not self._stepped and not isinstance(trainer.strategy, FSDPStrategy):
            warn_of_unreached(pl_module)
        self._stepped = True
        if not trainer._logger_connector.should_update_logs:  # as LearningRateMonitor asks
            return
        pl_module.log("train/lr", optimizer.param_groups[0]["lr"])
        if not isinstance(trainer.strategy, FSDPStrategy):
            gradients = [one.grad for one in pl_module.parameters() if one.grad is not None]
            # In two calls: torch refuses to stack the norms of sharded gradients with those of whole ones.
            groups = ([one for one in gradients if isinstance(one, DTensor) is sharded] for sharded in (False, True))
            norms = (get_total_norm(group) for group in groups if group)
            # Under FSDP2 a collective call of all ranks.
            whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in norms]
            pl_module.log("train/grad_norm", torch.stack(whole).norm() if whole else torch.zeros(()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise InputError if a step returned no loss, for which Lightning skips the step without a word."""
        if pl_module.automatic_optimization and not outputs:
            raise InputError(f"{type(pl_module).__name__}.training_step returned None; it must return the loss")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step a ReduceLROnPlateau with its metric; a sanity check only looks for the metric.

        Lightning steps it after the checkpoint of an epoch's end, so that a resumed run would lack that step.

        Raises:
            InputError: If the validation logs no metric of that name.
        """
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


def warn_of_unreached(module: nn.Module) -> None:
    """Warn in one line of trained weights to which a backward pass gave no gradient, not even zeros."""
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    places = [name.rpartition(".")[0] for name, one in trained.items() if one.grad is None]
    if not places:
        return
    few = ", ".join(f"{name} ({type(module.get_submodule(name)).__name__})" for name in [*dict.fromkeys(places)][:3])
    rank_zero_warn(
        f"{type(module).__name__}: {len(places)} of {len(trained)} trained weights got no gradient in the first step, "
        f"such as those of {few}: what is computed from them is not part of the loss, or detach, item or no_grad cut "
        "it off; freeze weights that are not to train by requires_grad_(False)"
    )
