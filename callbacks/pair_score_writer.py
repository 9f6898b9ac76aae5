"""Callback that writes predicted scores to parquet."""

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from latentreward.callbacks.resumed_settings import log_folder
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from latentreward.core.contracts import to_float64
from latentreward.core.errors import InputError
from latentreward.core.storage.durable import replacing, write_errors_named


class PairScoreWriter(BasePredictionWriter):
    """Callback that writes the scores of ``predict`` to one parquet file per rank: ``scores_rank0.parquet``, ….

    Rows are pairs × noise levels with the columns ``pair_id``, ``chosen_key``, ``rejected_key``, ``label``,
    ``timestep``, ``sigma``, ``chosen_score``, ``rejected_score``, ``margin``. An unlabelled pair has
    label ½, like a tie. A file grows batch by batch under a hidden name and is renamed when its rank has finished, so
    a file with the final name is complete.

    Args:
        output_dir: Folder of the files; None takes ``predictions/`` in the run's log folder.
        overwrite: Replace files of an earlier prediction instead of stopping.

    Raises:
        InputError: If a file exists already and ``overwrite`` is false.

    Example:
        ``latentreward predict --config … --predictions.output_dir=scores``; the command line adds this callback itself.
    """

    def __init__(self, output_dir: Path | None = None, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.output_dir, self.overwrite = output_dir, overwrite
        self._path: Path
        self._writer: Any = None
        self._open = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise InputError if earlier results exist and ``overwrite`` is false, before anything is scored."""
        folder = log_folder(trainer) / "predictions"  # a collective call
        self._path = Path(self.output_dir or folder) / f"scores_rank{trainer.global_rank}.parquet"
        if self._path.exists() and not self.overwrite:
            raise InputError(
                f"{self._path} is there already; set predictions.overwrite: true or another predictions.output_dir"
            )

    def write_on_batch_end(self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any) -> None:
        """Append the scores of a batch to this rank's file."""
        import pyarrow as pa
        from pyarrow import parquet

        rewards = prediction.chosen, prediction.rejected  # (N,), or (N, out_dim) of a head with several outputs
        chosen, rejected = (to_float64(one).reshape(len(one), -1).mean(dim=1).tolist() for one in rewards)
        table = pa.table(
            {
                "pair_id": list(prediction.pair_ids),
                "chosen_key": list(prediction.chosen_keys),
                "rejected_key": list(prediction.rejected_keys),
                "label": to_float64(prediction.label).tolist(),
                "timestep": to_float64(prediction.timesteps).tolist(),
                "sigma": to_float64(prediction.chosen_sigmas).tolist(),
                "chosen_score": chosen,
                "rejected_score": rejected,
                "margin": [first - second for first, second in zip(chosen, rejected, strict=True)],
            }
        )
        with write_errors_named(self._path):
            if self._writer is None:
                partial = self._open.enter_context(replacing(self._path))
                self._writer = self._open.enter_context(
                    parquet.ParquetWriter(partial, table.schema, write_page_checksum=True)
                )
            self._writer.write_table(table)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file, rename it, and print its path."""
        if self._writer is not None:
            self._open.close()
            self._writer = None
            others = ", and beside it those of the other ranks" if trainer.world_size > 1 else ""
            rank_zero_info(f"scores: {self._path}{others}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the unfinished file."""
        with suppress(Exception):
            self._open.__exit__(type(exception), exception, exception.__traceback__)
        self._writer = None
