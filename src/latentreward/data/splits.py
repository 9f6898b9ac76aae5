"""Readers of some rows of another reader: a fixed random cut, or rows of which no prompt is in two splits."""

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from latentreward.core.contracts import PreferencePair
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.data.readers.base import OnError, PairReader, normalise_prompt

USED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""Stage, or subcommand -> splits that it reads; the first split must be set."""


class ChosenRows(PairReader):
    """Reader of some ``rows``, ``(len,)``, of another reader."""

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
        return self.reader.labels()[self.rows]

    def _of(self, values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in self.rows]

    def prompts(self) -> list[str]:
        return self._of(self.reader.prompts())

    def pair_ids(self) -> list[str]:
        return self._of(self.reader.pair_ids())

    def groups(self) -> list[str]:
        return self._of(self.reader.groups())

    def facts(self) -> dict[str, list[Any]]:
        return {name: self._of(values) for name, values in self.reader.facts().items()}


logger = logging.getLogger(__name__)

SharedPrompts = Literal["drop", "keep", "raise"]
KEEP = "set data.shared_prompts: keep"
MUCH = 0.2
"""Fraction of a split's labelled rows; if more are left out, the log line also says how to keep them."""


def select_rows(
    splits: dict[str, PairReader], shared_prompts: SharedPrompts = "drop", remedy: str = "label rows"
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Select the labelled rows of each split, by default only those whose prompt is not in a later split.

    Prompts are compared after :func:`normalise_prompt`. ``splits`` are readers in the order train, val, test, of which
    the last keeps all its labelled rows. Of rows whose prompt is in a later split, ``"drop"`` logs the number, and
    ``"raise"`` raises InputError. ``remedy`` says what to do about unlabelled rows.

    Returns:
        Ascending row numbers, ``(rows,)``, by split; and the error message of each split that has no rows left.
    """
    taken: set[str] = set()
    selected: dict[str, np.ndarray] = {}
    emptied: dict[str, str] = {}
    later: list[str] = []
    normalise = cache(normalise_prompt)
    for name in reversed(splits):
        reader = splits[name]
        prompts = [] if shared_prompts == "keep" else [normalise(prompt) for prompt in reader.prompts()]
        labelled = reader.labelled()
        shared = np.zeros(len(reader), dtype=bool)
        shared[: len(prompts)] = [prompt in taken for prompt in prompts]
        have = f"have a prompt that {' or '.join(reversed(later))} has too"
        if shared.any() and shared_prompts == "raise":
            first = int(np.flatnonzero(shared)[0])
            told = f"{int(shared.sum())} of {len(reader)} rows {have}, first {reader.pair_ids()[first]}"
            raise InputError(
                f"data.{name}: {told} {reader.prompts()[first][:60]!r}; set data.shared_prompts: drop, or keep"
            )
        selected[name] = np.flatnonzero(labelled & ~shared)
        if not len(selected[name]):
            causes = [(~labelled, "are unlabelled", remedy), (labelled & shared, have, KEEP)]
            found = [(int(rows.sum()), what, fix) for rows, what, fix in causes if rows.any()]
            told = ", ".join(f"{rows} {what}" for rows, what, _ in found)
            remedies = ", ".join([*(fix for *_, fix in found), "or give other splits"])
            emptied[name] = f"data.{name}: none of {len(reader)} rows left{': ' if told else ''}{told}; {remedies}"
        elif shared.any():
            much = (labelled & shared).sum() > MUCH * labelled.sum()
            rest = f", {len(selected[name])} labelled rows remain; to keep them, {KEEP}" if much else ""
            logger.warning("data.%s: %d of %d rows %s; left out%s", name, shared.sum(), len(reader), have, rest)
        taken.update(prompts)
        later.append(name)
    return selected, emptied


def split_by_prompt(reader: PairReader, share: float) -> tuple[PairReader, PairReader]:
    """Divide a reader's rows into two readers that share no prompt; the second has this share of the prompts.

    Which prompts these are depends on their texts and number alone, not on the seed of a run or the order of rows.
    """
    prompts = [normalise_prompt(prompt) for prompt in reader.prompts()]
    drawn = sorted(set(prompts), key=lambda prompt: digest(["val", prompt]))
    number = max(1, round(share * len(drawn)))
    if not 0 < share < 1 or number >= len(drawn):
        told = f"data.val_share={share} of {len(drawn)} prompts leaves a split without any"
        raise InputError(f"{told}; give a share between 0 and 1 and pairs of more prompts, or set data.val")
    taken = set(drawn[:number])
    held_out = np.array([prompt in taken for prompt in prompts], dtype=bool)
    return ChosenRows(reader, np.flatnonzero(~held_out)), ChosenRows(reader, np.flatnonzero(held_out))


def tell_unopened(problem: object) -> None:
    """Log that ``test`` could not be opened, so that other splits may keep rows with its prompts."""
    logger.warning("data.test is not opened (%s): the other splits keep rows whose prompt it has", problem)
