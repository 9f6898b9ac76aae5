"""Callback that shows the progress of a run and the time left."""

import logging
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from latentreward.callbacks.exact_resume import batch_progress
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from latentreward.alignment import AlignmentModule
from latentreward.core.errors import check_range
from latentreward.core.storage.progress import INTERVAL, Progress


class RunProgress(ProgressBar):
    """Callback that shows optimiser steps done, steps of the whole run, and the time left, on standard error.

    On a terminal the callback shows a bar; otherwise it prints a line at the start, every ``every_s`` seconds and at
    the end. Only global rank 0 shows progress. Epoch and metrics logged with ``prog_bar=True`` are shown too.
    Validation, test and prediction have a bar of their own, or lines if they take longer than ``every_s``. So has each
    rollout of an alignment, with lines after 10 s, which count the sampling steps of all its batches.

    The time left assumes that the run ends by ``max_steps``, ``max_epochs`` or ``max_time``, whichever comes first; it
    does not foresee other ends, such as ``EarlyStopping`` or ``data.max_prompts``. It is computed from the mean time of
    a step since this process began to train, rollouts and validations included.

    The command line adds this callback to every run, unless ``trainer.callbacks`` has a progress bar or
    ``trainer.enable_progress_bar`` is false.

    Args:
        every_s: Seconds between lines where standard error is not a terminal.

    Example:
        ``--trainer.callbacks+=RunProgress --trainer.callbacks.every_s=300``
    """

    def __init__(self, every_s: float = 30.0) -> None:
        super().__init__()
        check_range("(0, inf]", every_s=every_s)
        self.every_s, self.is_enabled = every_s, True
        self._run: Progress | None = None
        self._evaluation: Progress | None = None
        self._shown_step = 0
        self._redirected = ExitStack()

    def disable(self) -> None:
        """Show nothing."""
        self.is_enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self.is_enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        tqdm.write(sep.join(map(str, args)), **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.is_enabled:
            return
        if sys.stderr.isatty():  # otherwise log messages would be written into the bar
            loggers = [logging.getLogger(name) for name in (None, "lightning.pytorch", "lightning.fabric")]
            self._redirected.enter_context(logging_redirect_tqdm(loggers))
            logging.captureWarnings(True)
            self._redirected.callback(logging.captureWarnings, False)
        self._shown_step = trainer.global_step
        if isinstance(pl_module, AlignmentModule):
            pl_module.rollout_progress = self.begin_rollout
        self._run = Progress(
            "train",
            total_steps(trainer),
            "steps",
            trainer.global_step,
            interval=self.every_s,
            delay=0.0,
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            self._run.expect(total_steps(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._run is not None and trainer.global_step > self._shown_step:
            self._run.add(trainer.global_step - self._shown_step, **self._values(trainer, pl_module))
            self._shown_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            self._run.add(0, **self._values(trainer, pl_module))
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._begin("sanity check", trainer.num_sanity_val_batches)
        else:
            self._begin("validation", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("prediction", trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.add()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    on_test_end = on_predict_end = on_validation_end

    def _begin(self, name: str, batches: Sequence[float]) -> None:
        if self.is_enabled:
            total = sum(batches)
            known = int(total) if math.isfinite(total) else None
            self._evaluation = Progress(name, known, "batches", interval=self.every_s, delay=self.every_s)

    def begin_rollout(self, steps: int, batches: int) -> Progress:
        """Begin the display of a rollout of so many sampling steps in so many batches."""
        name = "rollout" if batches == 1 else f"rollout of {batches} batches"
        first = min(self.every_s, INTERVAL)  # the first rollout is also the first sign of life
        return Progress(name, steps * batches, "steps", interval=self.every_s, delay=first)

    def _values(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {"epoch": trainer.current_epoch, **self.get_metrics(trainer, pl_module)}

    def _close(self) -> None:
        for progress in (self._evaluation, self._run):
            if progress is not None:
                progress.close()
        self._evaluation = self._run = None
        self._redirected.close()


def total_steps(trainer: Trainer) -> int | None:
    """Return the optimiser step at which ``max_steps`` or ``max_epochs`` ends the run; None if neither does.

    Valid when training or an epoch begins. Lightning's ``estimated_stepping_batches`` assumes that all epochs are as
    long as the present one, which is wrong after a resume with another batch size. It also raises if the gradient
    accumulation changes from epoch to epoch.
    """
    batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    total = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if trainer.max_epochs not in (None, -1) and math.isfinite(batches):
        # When an epoch begins, the counters are still those of the previous epoch.
        used = batch_progress(trainer).current.processed if trainer.fit_loop.restarted_mid_epoch else 0
        later = max(0, trainer.max_epochs - trainer.current_epoch - 1) * math.ceil(batches / accumulated)
        total = min(total, trainer.global_step + math.ceil((batches - used) / accumulated) + later)
    return int(total) if math.isfinite(total) else None
