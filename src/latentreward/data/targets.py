"""Given values of the images of pairs, such as a teacher's scores, from tables with a row per pair."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, did_you_mean, errors_at
from latentreward.data.readers.base import PairReader
from latentreward.data.score_table import ScoreTable

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test", "predict")


@dataclass(frozen=True)
class ScoreTargets:
    """Columns of tables of scores, as ``latentreward score-pairs`` writes them, that a loss compares scores with.

    For each name NAME a table has two columns, with the values of images a and b as the reader gives them, NAME_a and
    NAME_b, or NAME_chosen and NAME_rejected; see :class:`~latentreward.data.ScoreTable`. Images may lack a
    value.

    Attributes:
        tables: Split, such as ``train`` or ``val`` → CSV or parquet file of its pairs.
        columns: Names of the values, one for each score of the head.
        uncertainties: Names of the standard deviations of ``columns``, in the same order; empty for none.
        standardise: Whether to z-score each column: the mean and standard deviation over all images in the table of
            ``train`` become 0 and 1. Uncertainties are divided by the same standard deviation. Set False for labels.
    """

    tables: Mapping[str, PathText]
    columns: Sequence[str]
    uncertainties: Sequence[str] = ()
    standardise: bool = True

    def __post_init__(self) -> None:
        if not self.columns or not self.tables:
            missing = "columns" if self.tables else "tables"
            raise InputError(f"data.targets.{missing} is empty; name at least one, or leave targets out")
        if unknown := [name for name in self.tables if name not in SPLITS]:
            raise InputError(f"data.targets.tables: there is no split {unknown[0]!r}{did_you_mean(unknown[0], SPLITS)}")
        if self.uncertainties and len(self.uncertainties) != len(self.columns):
            raise InputError(
                f"data.targets.uncertainties has {len(self.uncertainties)} names for {len(self.columns)} columns; name "
                "one for each, or none"
            )
        if self.standardise and "train" not in self.tables:
            raise InputError(
                "data.targets.tables has no train, over which columns are z-scored; add it or set standardise: false"
            )

    def values(self, split: str, reader: PairReader) -> Tensor | None:
        """Return the values of every row of the reader of a split.

        Returns:
            ``(N, 2, 1, K)`` float32 for images a and b and K columns, ``(N, 2, 2, K)`` with the uncertainties after the
            values; NaN where an image has none. None if the split has no table.
        """
        if split not in self.tables:
            return None
        table = ScoreTable(self.tables[split])
        values = np.stack([table.sides(name, reader) for name in self.columns], axis=-1)
        self._check_finite(table, values, self.columns, reader)
        missing = np.isnan(values).all(axis=-1)
        if missing.all():
            raise InputError(f"{table.path}: no image of data.{split} has a value of {', '.join(self.columns)}")
        if missing.any():
            logger.warning(
                "%s: %d of %d images of data.%s have no value, and are left out of the loss",
                table.path, missing.sum(), missing.size, split,
            )  # fmt: skip
        mean, scale = self._scales()
        parts = [(values - mean) / scale]
        if self.uncertainties:
            spread = np.stack([table.sides(name, reader) for name in self.uncertainties], axis=-1)
            self._check_finite(table, spread, self.uncertainties, reader)
            if (wrong := ~(spread > 0) & ~np.isnan(values)).any():
                name = self.uncertainties[int(np.argwhere(wrong)[0][-1])]
                raise InputError(
                    f"{table.path}: {name} is {spread[wrong][0]:g} for an image with a value; an uncertainty is a "
                    "positive number"
                )
            parts.append(spread / scale)
        return torch.from_numpy(np.stack(parts, axis=2)).float()

    @staticmethod
    def _check_finite(table: ScoreTable, values: np.ndarray, names: Sequence[str], reader: PairReader) -> None:
        if (wrong := np.isinf(values)).any():
            row, side, column = np.argwhere(wrong)[0]
            raise InputError(
                f"{table.path}: {names[column]}_{'ab'[side]} of pair {reader[int(row)].pair_id} is "
                f"{values[row, side, column]:g}; give a finite number, or an empty cell for none"
            )

    def _scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of each column over the images of ``train``, 0 and 1 for no z-scores."""
        if not self.standardise:
            return np.zeros(len(self.columns)), np.ones(len(self.columns))
        table = ScoreTable(self.tables["train"])
        values = np.stack([table.sides(name).ravel() for name in self.columns], axis=-1)
        mean, scale = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        if not (scale > 0).all():
            name = self.columns[int(np.argmin(scale > 0))]
            raise InputError(
                f"{table.path}: all values of {name} are equal or missing; give a column that tells images"
            )
        return mean, scale


def label_remedy(targets: ScoreTargets | None) -> str:
    """Return what to do about unlabelled rows."""
    return "label rows" + (" (0.5 where only the values of data.targets are learned)" if targets else "")


def check_targets(module: Any, datasets: Mapping[str, Any], stage: str | None) -> None:
    """Check, before the first batch, that the splits of a stage hold the values that the module's loss needs."""
    check = getattr(getattr(module, "loss", None), "check_targets", None)
    if check is None:
        return
    for name in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", ()):
        if name in datasets:
            with errors_at(f"data.targets.tables.{name}: "):
                check(datasets[name].targets)
