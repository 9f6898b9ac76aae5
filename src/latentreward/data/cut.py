"""Readers of some rows of another reader, such as a fixed random cut of a data set."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from latentreward.core.contracts import PreferencePair
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.running import pair_generator
from latentreward.data.readers.base import OnError, PairReader, normalise_prompt


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

    def missing_files(self, rows: Iterable[int]) -> list[tuple[int, str]]:
        own = self.rows[[*rows]]
        places = {int(row): place for place, row in enumerate(self.rows)}
        return [(places[row], path) for row, path in self.reader.missing_files(own)]

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


class CutReader(ChosenRows):
    """Reader of a fixed random choice of another reader's labelled rows, in their order.

    Each row draws a random number from ``seed`` and its ``pair_id``, and the rows with the smallest numbers are chosen.
    Two cuts of one data set with one seed therefore share their rows as far as possible: the smaller cut is part of the
    larger one, and rows that are missing from a copy change nothing for the others but to make room.

    Args:
        reader: Source of the pairs.
        pairs: Number of pairs to choose.
        seed: Seed of the choice.
        apart_from: Reader of pairs that the model will be tested on; rows with one of its prompts are left out.
        on_error: What happens to images that cannot be read, see :class:`PairReader`; by default as ``reader`` has it.

    Raises:
        InputError: If fewer rows are left than ``pairs``.
    """

    def __init__(
        self,
        reader: PairReader,
        pairs: int,
        seed: int = 0,
        apart_from: PairReader | None = None,
        on_error: OnError | None = None,
    ) -> None:
        check_at_least_one(pairs=pairs)
        keep = reader.labelled()
        if apart_from is not None:
            taken = set(map(normalise_prompt, apart_from.prompts()))
            keep = keep & np.array([normalise_prompt(prompt) not in taken for prompt in reader.prompts()], dtype=bool)
        rows = np.flatnonzero(keep)
        if len(rows) < pairs:
            raise InputError(
                f"pairs={pairs}, but {len(rows)} of {len(reader)} rows have a label and no prompt of apart_from; set "
                f"pairs to {len(rows)} or less, or add files to the data set"
            )
        names = reader.pair_ids()
        drawn = [float(torch.rand((), generator=pair_generator(seed, "cut", 0, names[row]))) for row in rows]
        super().__init__(reader, np.sort(rows[np.argsort(drawn, kind="stable")[:pairs]]), on_error)
