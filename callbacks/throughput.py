"""Callback that measures training speed and the wait for data."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from latentreward.core.errors import check_at_least_one


class Throughput(Callback):
    """Callback that logs training speed and the share of time spent waiting for data.

    The values are ``train/pairs_per_second`` (in an alignment rows or prompts), over all ranks, and
    ``train/data_wait``. Validation time is left out. A ``data_wait`` above a few per cent means that more loader
    workers would help.

    Args:
        every_n_batches: Batches per measurement; values are logged after each.

    Raises:
        InputError: If ``every_n_batches`` is below 1.

    Example:
        ``--trainer.callbacks+=Throughput --trainer.callbacks.every_n_batches=20``
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        check_at_least_one(every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self._restart()

    def _restart(self) -> None:
        self._waiting = self._working = 0.0
        self._pairs = self._batches = 0
        self._since = perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the measurement, with each epoch and after a validation inside one."""
        self._restart()

    on_validation_end = on_train_epoch_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch ended as waiting for data."""
        now = perf_counter()
        # Lightning fetches the next batch between these two hooks.
        self._waiting, self._since = self._waiting + now - self._since, now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count the batch, and log after every ``every_n_batches`` batches."""
        now = perf_counter()
        self._working, self._since = self._working + now - self._since, now
        rows = next(iter(batch.values())) if isinstance(batch, Mapping) else batch  # such as prompts, and images
        self._pairs, self._batches = self._pairs + len(rows), self._batches + 1
        if self._batches < self.every_n_batches:
            return
        elapsed = self._waiting + self._working
        pl_module.log_dict(
            {
                "train/pairs_per_second": trainer.world_size * self._pairs / elapsed,
                "train/data_wait": self._waiting / elapsed,
            }
        )
        self._restart()
