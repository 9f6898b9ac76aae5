"""Base of readers that give some rows of another reader."""

from typing import Any

import numpy as np

from latentreward.contracts import PreferencePair
from latentreward.data.readers import PairReader
from latentreward.data.readers.base import OnError


class ChosenRows(PairReader):
    """Base class of readers of some rows of another reader.

    Args:
        reader: Source of the pairs.
        rows: Row numbers in ``reader``, ``(len,)``.
        on_error: What happens to images that cannot be read, see :class:`PairReader`; by default as ``reader`` has it.
    """

    def __init__(self, reader: PairReader, rows: np.ndarray, on_error: OnError | None = None) -> None:
        super().__init__(on_error or reader.own_on_error, exif=reader.exif)
        self.reader, self.rows, self.holds = reader, rows, reader.holds

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PreferencePair:
        return self.reader[int(self.rows[index])]

    def labels(self) -> np.ndarray:
        """Return ``label_a`` of every chosen row, ``(len,)`` float64."""
        return self.reader.labels()[self.rows]

    def prompts(self) -> list[str]:
        """Return the raw prompt of every chosen row."""
        prompts = self.reader.prompts()
        return [prompts[row] for row in self.rows]

    def pair_ids(self) -> list[str]:
        """Return the ``pair_id`` of every chosen row."""
        pair_ids = self.reader.pair_ids()
        return [pair_ids[row] for row in self.rows]

    def groups(self) -> list[str]:
        """Return the group of every chosen row."""
        groups = self.reader.groups()
        return [groups[row] for row in self.rows]

    def facts(self) -> dict[str, list[Any]]:
        """Return the facts of every chosen row, see :meth:`PairReader.facts`."""
        return {name: [values[row] for row in self.rows] for name, values in self.reader.facts().items()}
