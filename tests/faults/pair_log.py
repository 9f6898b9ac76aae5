"""Plug-in callback of the fault tests: which process trained on which pairs, line by line as it happens."""

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class PairLog(Callback):
    """Append a line to ``rank<r>.jsonl`` as each batch begins, and one to ``validations.jsonl`` as validation ends.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the batch that comes."""
        where = {"epoch": trainer.current_epoch, "batch": batch_idx, "step": trainer.global_step, "pid": os.getpid()}
        self._append(f"rank{trainer.global_rank}.jsonl", {**where, "pairs": batch.pair_ids})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log that the metrics of this step are there."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self._append("validations.jsonl", {"step": trainer.global_step, **values})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
