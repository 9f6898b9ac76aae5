"""Callback that keeps one resumable checkpoint of a run, ``last.ckpt``."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from latentreward.core.contracts import PathText
from latentreward.core.errors import check_at_least_one


class LastCheckpoint(ModelCheckpoint):
    """Callback that writes ``last.ckpt`` every n optimiser steps, at the end of each epoch, and at the end of the run.

    Each save replaces the file of the one before, and no state is written twice. A new run in a folder that has the
    ``last.ckpt`` of an earlier run writes ``last-v1.ckpt``, and so on.

    ``ModelCheckpoint(save_last=True)`` writes each state to two files. With ``every_n_train_steps`` it leaves out the
    end of the run.

    Args:
        every_n_train_steps: Largest number of optimiser steps that a kill or a power cut may lose.
        dirpath: Folder; None takes ``checkpoints`` in the logger's folder.

    Example:
        ``--trainer.callbacks+=LastCheckpoint --trainer.callbacks.every_n_train_steps=250``
    """

    def __init__(self, every_n_train_steps: int = 100, dirpath: PathText | None = None) -> None:
        check_at_least_one(every_n_train_steps=every_n_train_steps)
        super().__init__(dirpath, save_top_k=0, save_last=True, every_n_train_steps=every_n_train_steps)

    @property
    @override
    def state_key(self) -> str:
        """Key without ``every_n_train_steps``, so that a run resumed with another interval goes on in its file."""
        return type(self).__qualname__

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save after every n-th optimiser step, and when the run ends within an epoch.

        From there a run with a raised limit takes the other batches of that epoch; from Lightning's later hooks it
        would begin the next epoch. After the last batch of an epoch, :meth:`on_train_epoch_end` saves. Nothing is saved
        between optimiser steps: accumulated gradients would be lost.
        """
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return
        if loop._is_training_done or loop.done:  # in the first batch of a resumed run, `done` waits for a validation
            self._save(trainer)
        else:
            super().on_train_batch_end(trainer, pl_module, *args)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, and if the run ends where :meth:`on_train_batch_end` cannot save."""
        self._save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing; Lightning would save here even under ``fast_dev_run``."""

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
