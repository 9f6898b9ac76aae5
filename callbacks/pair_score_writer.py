"""Predictions as parquet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from latentreward.errors import InputError


class PairScoreWriter(BasePredictionWriter):
    """Write what ``predict`` scored, one parquet file per rank: ``scores_rank0.parquet``, ….

    Rows are pairs × noise levels with the columns ``pair_id``, ``chosen_key``, ``rejected_key``, ``label``,
    ``timestep``, ``sigma``, ``chosen_score``, ``rejected_score``, ``margin``; the label of an unlabelled pair is ½, as
    that of a tie. A file grows batch by batch under a ``.partial`` name and gets its own when the rank is done, so a
    file that is there is whole.

    Args:
        output_dir: Folder of the files; None takes ``predictions/`` in the run's log folder.
        overwrite: Replace files of an earlier prediction instead of stopping.

    Raises:
        InputError: If a file is there already and ``overwrite`` is false.

    Example:
        ``latentreward predict --config … --predictions.output_dir=scores``; the command line adds this callback itself.
    """

    def __init__(self, output_dir: Path | None = None, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.output_dir, self.overwrite = output_dir, overwrite
        self._writer: Any = None

    def _path(self, trainer: Trainer) -> Path:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        return Path(self.output_dir or folder) / f"scores_rank{trainer.global_rank}.parquet"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for earlier results before anything is scored."""
        path = self._path(trainer)
        if path.exists() and not self.overwrite:
            raise InputError(
                f"{path} is there already; set predictions.overwrite: true or another predictions.output_dir"
            )

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch."""
        import pyarrow as pa
        from pyarrow import parquet

        chosen, rejected = (mean_output(rewards).tolist() for rewards in (prediction.chosen, prediction.rejected))
        table = pa.table(
            {
                "pair_id": list(prediction.pair_ids),
                "chosen_key": list(prediction.chosen_keys),
                "rejected_key": list(prediction.rejected_keys),
                "label": prediction.label.double().tolist(),
                "timestep": prediction.timesteps.double().tolist(),
                "sigma": prediction.chosen_sigmas.double().tolist(),
                "chosen_score": chosen,
                "rejected_score": rejected,
                "margin": [first - second for first, second in zip(chosen, rejected, strict=True)],
            }
        )
        if self._writer is None:
            partial = self._path(trainer).with_suffix(".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            self._writer = parquet.ParquetWriter(partial, table.schema)
        self._writer.write_table(table)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file, give it its name, and say where it is."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            path = self._path(trainer)
            path.with_suffix(".partial").replace(path)
            others = ", and beside it those of the other ranks" if trainer.world_size > 1 else ""
            rank_zero_info(f"scores: {path}{others}")


def mean_output(rewards: Any) -> Any:
    """``(N,)`` float64 from ``(N,)`` or ``(N, out_dim)``."""
    return rewards.double() if rewards.ndim == 1 else rewards.double().mean(dim=1)
