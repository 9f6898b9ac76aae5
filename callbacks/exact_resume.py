"""A resumed run takes the steps that the uninterrupted one would have taken."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import TrainerFn

from latentreward.data.loading import ResumableLoader
from latentreward.seeding import pair_generator, run_seed


class ExactResume(Callback):
    """What Lightning's checkpoints lack for a resume, in the middle of an epoch, to end with equal weights.

    - Before each batch, the global generators of PyTorch, NumPy and Python (dropout, for example) are seeded from
      seed, epoch, optimiser step, batch and rank. So their state need not be saved, which would take every rank's.
    - A checkpoint in the midst of gradient accumulation, which holds no gradients, counts only the batches up to the
      last optimiser step; the resumed run takes the later ones again.
    - A checkpoint from before a validation that is due has the resumed run validate; Lightning would leave it out.
    - One from the end of an epoch has a run with ``max_steps`` begin the next; Lightning would leave out an epoch.
    - One from the end of an epoch hands its loader's state on, which may concern the next; Lightning drops it.
    - One from the last batch of an epoch has the next epoch counted; Lightning would not, and the resumed run's own
      checkpoints would lead astray.
    - After a resume with another batch or world size, Lightning's batch counter is set to what the rest of the epoch
      then is.

    It needs a :class:`~latentreward.data.loading.ResumableLoader` for training; the command line adds one to every
    fit.

    Args:
        seed: Seed of the global generators; None takes the run's ``seed_everything``.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = run_seed(seed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches used of this epoch as batches of the present size."""
        # Lightning calls this hook from _FitLoop.on_run_start: loaders have their state, and reset() has told from the
        # saved counters at which place the checkpoint was written, but advance() has not yet acted on it.
        load_dropped_state(trainer.fit_loop)
        if trainer.fit_loop.restarted_on_epoch_end:
            close_epoch(trainer.fit_loop)
        elif trainer.fit_loop.restarted_mid_epoch and last_batch_was_saved(trainer.fit_loop):
            # reset() has counted the epoch as completed, yet advance() counts no new one while the stage says that
            # the run restarted in mid-epoch.
            trainer.fit_loop.reset_restart_stage()
        loader, progress = trainer.train_dataloader, batch_progress(trainer)
        if not (trainer.fit_loop.restarting and isinstance(loader, ResumableLoader)):
            return
        # The counters are batches of the size and number of processes at the time of saving, and the epoch ends when
        # they reach the present len(loader): count what is used as batches of the present size.
        used = len(loader) - (0 if progress.is_last_batch else loader.places.remaining())
        shift = used - progress.current.processed
        for counts in (progress.current, progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, getattr(counts, name) + shift)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the global generators."""
        purpose = f"step {trainer.global_step} batch {batch_idx} rank {trainer.global_rank}"
        seed = pair_generator(self.seed, purpose, trainer.current_epoch, "").initial_seed()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - whoever draws from the global generator shall get equal draws
        random.seed(seed)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Turn the saved counters back to the last optimiser step, or on to the validation that is due."""
        loop, saved = trainer.fit_loop, checkpoint["loops"]["fit_loop"]
        if trainer.state.fn != TrainerFn.FITTING or not pl_module.automatic_optimization:
            return
        # Of a batch, `ready` is counted before it begins, `processed` after its optimiser step, and `completed` after
        # the callbacks' on_train_batch_end: the differences tell from where this checkpoint is written.
        batches = batch_progress(trainer).current
        if batches.processed < batches.ready or loop._should_accumulate():
            undo_accumulation(trainer, saved)
        elif batches.completed < batches.processed and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            expect_validation(saved)


def batch_progress(trainer: Trainer) -> Any:
    """Lightning's counts of the training batches; its annotations lack half of them."""
    return trainer.fit_loop.epoch_loop.batch_progress


def load_dropped_state(loop: Any) -> None:
    """Load the loader's state that Lightning has read but, since its epoch was finished, not loaded.

    ``_FitLoop.setup_data`` skips it unless ``restarting``, which its setter turns off when an epoch's counters are
    even. What a loader tells after an epoch is where the next begins, such as rows of a rollout that are not used yet.
    """
    if loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []


def close_epoch(loop: Any) -> None:
    """Let a run of so many steps begin the next epoch, after a checkpoint from the end of one.

    Lightning does so in a run of N epochs. With ``max_steps`` the setter of ``restarting`` keeps it on
    (``_iteration_based_training``), and advance() would find the finished epoch's counters and count it twice.
    """
    loop.epoch_progress.increment_completed()
    _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # the fit loop's own setter refuses
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()


def last_batch_was_saved(loop: Any) -> bool:
    """Whether the checkpoint was written as the last batch of its epoch ended, before the epoch's own end."""
    return loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch


def undo_accumulation(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Make ``saved`` the state that the fit loop had when the last optimiser step's batch was done."""
    loader, progress = trainer.train_dataloader, saved["epoch_loop.batch_progress"]
    if not isinstance(loader, ResumableLoader):
        return
    batches = progress["current"]
    # Batches that have begun but not ended, and those since the last optimiser step: their gradients are not saved.
    since_step = batches["ready"] - batches["processed"] + batches["processed"] % trainer.accumulate_grad_batches
    undo = min(since_step, loader.delivered())
    saved["state_dict"]["combined_loader"] = [loader.state_dict(undo)]
    for counts in (progress["current"], progress["total"]):
        set_counts(counts, done=counts["ready"] - undo)


def expect_validation(saved: dict[str, Any]) -> None:
    """Make ``saved`` the state of a fit loop that is through with the batch and has begun to validate."""
    # With the batch completed and the validation ready but not processed, _TrainingEpochLoop takes the validation for
    # interrupted at its first batch, and runs it from there before it trains on.
    batches, validation = saved["epoch_loop.batch_progress"], saved["epoch_loop.val_loop.batch_progress"]
    for counts in (batches["current"], batches["total"]):
        set_counts(counts, done=counts["processed"])
    set_counts(validation["total"], done=validation["total"]["processed"], begun=1)
    set_counts(validation["current"], done=0, begun=1)
    validation["is_last_batch"] = False


def set_counts(counts: dict[str, int], done: int, begun: int = 0) -> None:
    """Have saved counters say that ``done`` batches are through and ``begun`` more have started."""
    counts.update(ready=done + begun, started=done + begun, processed=done, completed=done)
