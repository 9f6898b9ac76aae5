"""Stop before a NaN reaches the weights, or a checkpoint."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from latentreward.checkpoints.shards import not_finite
from latentreward.errors import InputError


class NaNGuard(Callback):
    """End the run at the first loss that is not finite, naming step and rows, before the backward pass.

    Rows are pairs of a data set, or prompts, with timesteps where rollouts gave them.

    Weights and optimiser keep their last good state, so the last checkpoint is worth going on from. The step itself
    may still spoil the weights: before a checkpoint is written, those that train, their average and the optimiser's
    state are looked at too, on all processes, and one that is not finite ends the run in place of the checkpoint. The
    command line adds one to every run.

    Args:
        every_n_batches: Look at every n-th batch; each look waits for the device.

    Raises:
        InputError: If ``every_n_batches`` is below 1, and in training when a loss or a weight is not finite.

    Example:
        ``--nan_guard.every_n_batches=10`` on the command line, or in Python ``Trainer(callbacks=[NaNGuard()])``.
    """

    def __init__(self, every_n_batches: int = 1) -> None:
        if every_n_batches < 1:
            raise InputError(f"every_n_batches={every_n_batches} must be at least 1")
        self.every_n_batches = every_n_batches
        self._batch: Any = None
        self._batch_idx = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand before the strategy's ``save_checkpoint``.

        Lightning calls it on all processes for every checkpoint, but leaves out the hook ``on_save_checkpoint`` of
        callbacks for those with ``save_weights_only``.
        """
        strategy = trainer.strategy
        strategy.save_checkpoint = partial(save_finite, trainer, type(strategy).save_checkpoint)  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the strategy its own method back."""
        vars(trainer.strategy).pop("save_checkpoint", None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which rows the coming loss belongs to."""
        self._batch, self._batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss."""
        if self._batch_idx % self.every_n_batches or torch.isfinite(loss).all():
            return
        raise InputError(
            f"loss is {loss.detach().float().mean().item()} at optimiser step {trainer.global_step} (epoch "
            f"{trainer.current_epoch}, batch {self._batch_idx}, rank {trainer.global_rank}) on {rows_of(self._batch)}; "
            "look at these, lower the learning rate, or train with precision bf16-mixed or 32-true"
        )


def save_finite(trainer: Trainer, save: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Write a checkpoint by a strategy's method ``save`` if all that it holds of the training is finite.

    Raises:
        InputError: Naming the optimiser step and the first tensor that is not finite; on all processes.
    """
    found = not_finite(trained_tensors(trainer, checkpoint))
    if not trainer.strategy.reduce_boolean_decision(found is None):
        raise InputError(
            f"{found or 'a weight on another process'} is not finite at optimiser step {trainer.global_step}; this "
            "checkpoint was not written, the one before stays: go on from it with a lower learning rate, or with "
            "precision bf16-mixed or 32-true"
        )
    save(trainer.strategy, checkpoint, *args, **kwargs)


def trained_tensors(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Weights that train and the optimiser's state, as this process has them, and averages in ``checkpoint``."""
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
    """The first rows of a batch in words."""
    pairs, prompts = getattr(batch, "pair_ids", ()), getattr(batch, "prompts", ())
    if pairs or not isinstance(prompts, tuple):
        return f"pairs {listed(pairs)}"
    timesteps = getattr(batch, "timesteps", None)
    if timesteps is None:
        return f"prompts {listed([repr(prompt) for prompt in prompts])}"
    texts = [f"{prompt!r} (t = {t:g})" for prompt, t in zip(prompts, timesteps.tolist(), strict=True)]
    return f"prompts {listed(texts)}"


def listed(names: Sequence[str], shown: int = 8) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
