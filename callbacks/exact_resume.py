"""Callback that makes a resumed run take the same steps as an uninterrupted one."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from latentreward.core.checkpoints.files import check_states
from latentreward.core.registry import of_framework
from latentreward.core.running import pair_generator, run_seed
from latentreward.data.loading import ResumableLoader


class ExactResume(Callback):
    """Callback that makes a run resumed at any batch end with the same weights as an uninterrupted run.

    Lightning's checkpoints alone do not ensure that. This callback adds:

    - Random numbers: before each batch, the global generators of PyTorch, NumPy and Python (used by dropout, for
      example) are seeded from seed, epoch, optimiser step, batch and rank. Their states need not be saved.
    - Gradient accumulation: a checkpoint written between two optimiser steps holds no gradients. Its counters are set
      back to the last optimiser step, and the resumed run repeats the batches after that step.
    - Validation: after a checkpoint written just before one, the resumed run validates first; Lightning would skip it.
    - Epochs: the next one begins where it would have, at the right batch, also with rows that the loader has left.
    - Other batch size or world size: Lightning's batch counter is converted to batches of the new size.
    - Classes of the user's own, whose state no checkpoint could give back, are refused before the first step.

    Training needs a :class:`~latentreward.data.loading.ResumableLoader`. The command line adds this callback to every
    fit.

    Args:
        seed: Seed of the global generators; None takes the run's ``seed_everything``.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = run_seed(seed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the loader's state, set the epoch's counters, and count used batches in the present batch size."""
        check_states(own_states(trainer, pl_module))
        # Lightning calls this hook from _FitLoop.on_run_start. By then loaders have their state, and reset() has
        # derived from the saved counters where the checkpoint was written; advance() has not yet acted on that.
        loop: Any = trainer.fit_loop
        if loop._combined_loader_states_to_load:
            # setup_data loads a loader's state only while `restarting` is true, whose setter makes it false when the
            # saved epoch is complete. The state then says where the next epoch begins: rows of a rollout not used yet.
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []
        if loop.restarted_on_epoch_end:
            close_epoch(loop)
        loader, progress = trainer.train_dataloader, batch_progress(trainer)
        if loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_train_batch_end and progress.is_last_batch:
            # The checkpoint was written after the last batch of an epoch, but before the epoch's end hooks. reset() has
            # counted the epoch as completed, but advance() does not count the next one while the stage is mid-epoch.
            loop.reset_restart_stage()
        if not (loop.restarting and isinstance(loader, ResumableLoader)):
            return
        # The counters are in batches of the batch size and world size at the time of saving, but the epoch ends when
        # they reach the present len(loader): convert the used batches to the present size.
        used = len(loader) - (0 if progress.is_last_batch else loader.places.remaining())
        shift = used - progress.current.processed
        for counts in (progress.current, progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, getattr(counts, name) + shift)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the global generators of PyTorch, NumPy and Python for this batch."""
        purpose = f"step {trainer.global_step} batch {batch_idx} rank {trainer.global_rank}"
        seed = pair_generator(self.seed, purpose, trainer.current_epoch, "").initial_seed()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - code that uses the global generator should get equal numbers
        random.seed(seed)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the saved counters back to the last optimiser step, or forward to a validation that is due."""
        loop, saved = trainer.fit_loop, checkpoint["loops"]["fit_loop"]
        if trainer.state.fn != TrainerFn.FITTING or not pl_module.automatic_optimization:
            return
        # Lightning counts a batch as `ready` before it begins, as `processed` after its optimiser step, and as
        # `completed` after the callbacks' on_train_batch_end: the differences show where this checkpoint is written.
        batches = batch_progress(trainer).current
        if batches.processed < batches.ready or loop._should_accumulate():
            undo_accumulation(trainer, saved)
        elif batches.completed < batches.processed and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            expect_validation(saved)


def own_states(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return the states of callbacks, data module and networks of other packages than this and Lightning, by name."""
    parts = [*trainer.callbacks, *filter(None, [trainer.datamodule])]  # type: ignore[attr-defined]
    own = [part for part in parts if not of_framework(type(part).__module__)]
    nets = [named for named in pl_module.named_modules() if type(named[1]).get_extra_state != nn.Module.get_extra_state]
    extra = {f"{name} (get_extra_state)": net.get_extra_state() for name, net in nets}
    return {type(part).__qualname__: part.state_dict() for part in own} | extra


def batch_progress(trainer: Trainer) -> Any:
    """Return Lightning's counts of training batches, as Any because Lightning's annotations lack half of them."""
    return trainer.fit_loop.epoch_loop.batch_progress


def close_epoch(loop: Any) -> None:
    """Let a run with ``max_steps`` begin the next epoch after a checkpoint from the end of an epoch.

    With ``max_epochs`` Lightning does that itself. With ``max_steps`` the setter of ``restarting`` keeps the value true
    (``_iteration_based_training``), and advance() would find the finished epoch's counters and count the epoch twice.
    """
    loop.epoch_progress.increment_completed()
    _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # the fit loop's own setter refuses
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()


def undo_accumulation(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Set ``saved``, the fit loop's state in a checkpoint, back to the end of the last optimiser step."""
    loaders, progress = CombinedLoader(trainer.train_dataloader).flattened, saved["epoch_loop.batch_progress"]
    if not all(isinstance(loader, ResumableLoader) for loader in loaders):
        return
    batches = progress["current"]
    # Undo batches that have begun but not ended, and batches since the last optimiser step: their gradients are lost.
    since_step = batches["ready"] - batches["processed"] + batches["processed"] % trainer.accumulate_grad_batches
    undo = min(since_step, *(loader.delivered() for loader in loaders))
    saved["state_dict"]["combined_loader"] = [loader.state_dict(undo) for loader in loaders]
    for counts in (progress["current"], progress["total"]):
        set_counts(counts, done=counts["ready"] - undo)


def expect_validation(saved: dict[str, Any]) -> None:
    """Change ``saved``, the fit loop's state in a checkpoint, so that the resumed run starts with the validation."""
    # If the batch is completed and the validation is ready but not processed, _TrainingEpochLoop assumes a validation
    # interrupted at its first batch, and runs that validation before it continues to train.
    batches, validation = saved["epoch_loop.batch_progress"], saved["epoch_loop.val_loop.batch_progress"]
    for counts in (batches["current"], batches["total"]):
        set_counts(counts, done=counts["processed"])
    set_counts(validation["total"], done=validation["total"]["processed"], begun=1)
    set_counts(validation["current"], done=0, begun=1)
    validation["is_last_batch"] = False


def set_counts(counts: dict[str, int], done: int, begun: int = 0) -> None:
    """Set saved counters to ``done`` finished batches and ``begun`` further batches that have started."""
    counts.update(ready=done + begun, started=done + begun, processed=done, completed=done)
