"""Callback that ends a run before a NaN reaches the weights or a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from latentreward.core.checkpoints.files import wrap_saving
from latentreward.core.checkpoints.shards import not_finite
from latentreward.core.errors import InputError, check_at_least_one


class NaNGuard(Callback):
    """Callback that ends the run at the first loss that is not finite, before the backward pass.

    The error names the optimiser step and the batch's rows: pairs of a data set, or prompts with their timesteps.
    Weights and optimiser keep their last good state. An optimiser step after a finite loss may still make a weight
    infinite or NaN: the trained weights, their average and the optimiser's state are checked on all processes before
    each checkpoint, which is not written if a value is not finite. The command line adds this callback to every run.

    Args:
        every_n_batches: Check the loss of every n-th batch; each check waits for the device.

    Example:
        ``--nan_guard.every_n_batches=10`` on the command line, or in Python ``Trainer(callbacks=[NaNGuard()])``.
    """

    def __init__(self, every_n_batches: int = 1) -> None:
        check_at_least_one(every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self._batch: Any = None
        self._batch_idx = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning skips the hook `on_save_checkpoint` for checkpoints with `save_weights_only`.
        wrap_saving(trainer.strategy, save_finite, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(trainer.strategy).pop("save_checkpoint", None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._batch_idx = batch, batch_idx  # so that an error can name its rows

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._batch_idx % self.every_n_batches or torch.isfinite(loss).all():
            return
        raise InputError(
            f"loss is {loss.detach().float().mean().item()} at optimiser step {trainer.global_step} (epoch "
            f"{trainer.current_epoch}, batch {self._batch_idx}, rank {trainer.global_rank}) on {rows_of(self._batch)}; "
            "look at these, lower the learning rate, or train with precision bf16-mixed or 32-true"
        )


def save_finite(trainer: Trainer, save: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Write a checkpoint by ``save`` if weights, averages and optimiser state are finite on all processes."""
    found = not_finite(trained_tensors(trainer, checkpoint))
    if not trainer.strategy.reduce_boolean_decision(found is None):
        raise InputError(
            f"{found or 'a weight on another process'} is not finite at optimiser step {trainer.global_step}; this "
            "checkpoint was not written, the one before stays: go on from it with a lower learning rate, or with "
            "precision bf16-mixed or 32-true"
        )
    save(checkpoint, *args, **kwargs)


def trained_tensors(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return this process's trained weights and optimiser state, and the averages in ``checkpoint``, by name."""
    module = trainer.lightning_module
    names: dict[Any, str] = {weight: name for name, weight in module.named_parameters() if weight.requires_grad}
    tensors = {name: weight.detach() for weight, name in names.items()}
    for state in checkpoint.get("callbacks", {}).values():
        average = state.get("average") if isinstance(state, dict) else None
        if isinstance(average, dict):
            averaged = {name: value for name, value in average.items() if isinstance(value, Tensor)}
            tensors |= {f"the average of {name}": value for name, value in averaged.items()}
    for optimizer in trainer.optimizers:
        for weight, state in optimizer.state.items():
            values = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"the optimiser's {key} of {names.get(weight, 'a weight')}": v for key, v in values.items()}
    return tensors


def rows_of(batch: Any) -> str:
    """Name the first rows of a batch, for a message; of prompts and images, those of both."""
    if isinstance(batch, Mapping):
        return " and ".join(map(rows_of, batch.values()))
    pairs, prompts = getattr(batch, "pair_ids", ()), getattr(batch, "prompts", ())
    kind, names = "pairs", list(pairs)
    if not pairs and isinstance(prompts, tuple):
        kind, timesteps = "prompts", getattr(batch, "timesteps", None)
        times = [""] * len(prompts) if timesteps is None else [f" (t = {t:g})" for t in timesteps.tolist()]
        names = [f"{prompt!r}{time}" for prompt, time in zip(prompts, times, strict=True)]
    return f"{kind} {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
