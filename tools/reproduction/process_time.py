"""Callback of rows that ends training after a budget of processor time, to compare methods at equal cost."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ProcessTimeBudget(Callback):
    """Callback of rows that ends training after a budget of processor time, rollouts and rewards included.

    Args:
        seconds: Budget in seconds of this process's processor time, from the start of training.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop training if the budget is used up."""
        used = time.process_time() - self._started
        if used > self.seconds:
            print(f"process time {used:.1f} s, optimiser steps {trainer.global_step}", flush=True)
            trainer.should_stop = True
