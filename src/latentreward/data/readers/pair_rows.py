"""Base of readers of pairs of your own: rows with a prompt, two images and a label, in a format that has names."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from latentreward.contracts import ImageRef, PreferencePair
from latentreward.data.readers.base import exchange_sides
from latentreward.data.readers.json_rows import JSONReader, parse_number, parse_text, parse_votes, short

INDEX = pa.schema(
    {
        "row": pa.int64(),
        "pair_id": pa.large_string(),
        "prompt": pa.large_string(),
        "path_a": pa.large_string(),
        "path_b": pa.large_string(),
        "label": pa.float64(),
        "winner_first": pa.bool_(),
        "weight": pa.float64(),
        "votes_a": pa.int64(),
        "votes_b": pa.int64(),
        "confidence": pa.float64(),
        "model_a": pa.string(),
        "model_b": pa.string(),
        "group_id": pa.large_string(),
        "split": pa.large_string(),
    }
)
WINNER_FIRST, BY_LABEL = ("chosen", "rejected"), ("image_a", "image_b")
WORDS = {"a": 1.0, "b": 0.0, "tie": 0.5}
MODELS = ("model_a", "model_b")
TEXTS = (*MODELS, "group_id", "split")
NOT_LABELS = (*WINNER_FIRST, *BY_LABEL, *TEXTS, "prompt", "label", "confidence", "weight", "pair_id")
"""Keys under which nobody looks for a label, beside the keys of labels themselves."""
NO_LABEL = "unlabelled (no label)"
LABEL_BESIDE = "label not read (chosen and rejected say who won)"
ROWS = 1 << 14
"""Rows that are Python's objects at one time, before they are packed into a part of the table."""
MOST_KEYS = 3
"""Other keys of unlabelled rows that a remark names; the rest are counted."""


class PairRowReader(JSONReader):
    """Base of readers of rows with ``chosen`` and ``rejected``, or with ``image_a``, ``image_b`` and ``label``.

    :class:`~latentreward.data.readers.jsonl.JSONLPairReader` describes the fields of a row. A subclass calls
    :meth:`fill` in its constructor.

    Args:
        source: Name of the data set.
        split: Name of the split of rows without their own.
        options: See :class:`~latentreward.data.readers.base.SideExchangingReader`.
    """

    def __init__(self, source: str, split: str, **options: Any) -> None:
        super().__init__(**options)
        self.source, self.split = source, split
        self._other_keys: Counter[str] = Counter()
        self._seen: set[str] = set()

    def fill(self, rows: Iterable[tuple[str, int, Any]]) -> None:
        """Check the rows, applying ``on_error``, and keep them in a compact form.

        Args:
            rows: Name, number and content of each row; a row whose content is no dict breaks the rules. The number is
                passed to :meth:`find_images`.
        """
        entries = (self.parse(*row) for row in rows)
        kept, parts = filter(None, entries), [INDEX.empty_table()]
        while some := list(islice(kept, ROWS)):  # all rows at once would be Python's objects, ten times as large
            columns = zip(*some, strict=True)
            parts.append(pa.table(dict(zip(INDEX.names, columns, strict=True)), schema=INDEX))
        self._table = pa.concat_tables(parts)
        self._seen.clear()
        self._name_other_keys()

    @abstractmethod
    def find_images(self, row: int, paths: tuple[str | None, str | None]) -> tuple[ImageRef, ImageRef]:
        """Return references to the images of a row, in its order.

        Args:
            row: Number of the row, see :meth:`fill`.
            paths: Texts in the row's fields of images; None for a field that holds none.
        """

    @abstractmethod
    def check_images(self, name: str, row: dict[str, Any], fields: tuple[str, str]) -> None:
        """Check the values of a row's two fields of images, applying ``on_error``."""

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> PreferencePair:
        row = {name: self._table.column(name)[index].as_py() for name in INDEX.names}
        return self.make_pair(row, self.find_images(row["row"], (row["path_a"], row["path_b"])))

    def make_pair(self, row: dict[str, Any], images: tuple[ImageRef, ImageRef]) -> PreferencePair:
        """Return the pair of a checked row, whose fields are those of ``INDEX``, with its images in the row's order."""
        pair = PreferencePair(
            pair_id=row["pair_id"],
            prompt=row["prompt"],
            image_a=images[0],
            image_b=images[1],
            label_a=row["label"],
            weight=row["weight"],
            group_id=row["group_id"],
            votes=None if row["votes_a"] is None else (row["votes_a"], row["votes_b"]),
            confidence=row["confidence"],
            model_a=row["model_a"],
            model_b=row["model_b"],
            source=self.source,
            split=row["split"] or self.split,
        )
        return pair.swapped() if row["winner_first"] and self.is_exchanged(row["pair_id"]) else pair

    def labels(self) -> np.ndarray:
        """Return ``label_a`` of every row after any exchange of images, ``(len,)`` float64, NaN for unlabelled rows."""
        labels = self._table.column("label").to_numpy()
        return np.where(self.exchanged(), 1.0 - labels, labels)

    def labelled(self) -> np.ndarray:
        """Return whether each row has a label, ``(len,)`` bool."""
        return self._table.column("label").is_valid().to_numpy()

    def prompts(self) -> list[str]:
        """Return the raw prompt of every row."""
        return self._table.column("prompt").to_pylist()

    def pair_ids(self) -> list[str]:
        """Return the ``pair_id`` of every row."""
        return self._table.column("pair_id").to_pylist()

    def facts(self) -> dict[str, list[Any]]:
        """Return votes, confidence and, if a row has them, models, each a list with one value per row."""
        models = [name for name in MODELS if self._table.column(name).null_count < len(self)]
        facts = {name: self._table.column(name).to_pylist() for name in ("votes_a", "votes_b", *(models and MODELS))}
        return {**exchange_sides(facts, self.exchanged()), "confidence": self._table.column("confidence").to_pylist()}

    def exchanged(self) -> np.ndarray:
        """Return for every row whether the chosen image is b, not a; always false for rows with ``image_a``."""
        if self._exchanged is None:
            rows = zip(self._table.column("winner_first").to_pylist(), self.pair_ids(), strict=True)
            self._exchanged = np.array([first and self.is_exchanged(name) for first, name in rows], dtype=bool)
        return self._exchanged

    def parse(self, name: str, number: int, content: Any) -> tuple[Any, ...] | None:
        """Parse one row, applying ``on_error``, to values in the order of ``INDEX``; None leaves the row out."""
        row, sound = self.check_row(name, content)
        pair_id = parse_text(row.get("pair_id")) or name
        if sound and pair_id in self._seen:
            self.refuse(name, f"pair_id {short(pair_id)} occurred before", "pair_id occurs twice")
            pair_id, sound = name, False
        fields = WINNER_FIRST if any(field in row for field in WINNER_FIRST) else BY_LABEL
        if sound:
            self.check_images(name, row, fields)
        sound, label = self._parse_label(name, row, fields, sound)
        sound, weight = self._parse_weight(name, row.get("weight"), sound)
        votes = parse_votes(row.get("votes"))
        if sound and votes is None and row.get("votes") is not None:
            self.remark(name, "votes not readable")
        sound = sound and self.check_votes(name, "votes", votes)
        if not sound and self.on_error == "skip":
            return None
        self._seen.add(pair_id)
        counts = votes if sound and votes is not None else (None, None)
        paths = [parse_text(row.get(field)) for field in fields]
        prompt, confidence = parse_text(row.get("prompt")) or "", self._parse_confidence(row.get("confidence"))
        texts = (parse_text(row.get(field)) for field in TEXTS)
        label, first = label if sound else None, fields == WINNER_FIRST
        return number, pair_id, prompt, *paths, label, first, weight, *counts, confidence, *texts

    def _parse_label(
        self, name: str, row: dict[str, Any], fields: tuple[str, str], sound: bool
    ) -> tuple[bool, float | None]:
        """Return whether the row has broken no rule so far, and the label of its first image; None if unlabelled."""
        if fields == WINNER_FIRST and row.get("label") is not None:
            self.remark(name, LABEL_BESIDE)
        if not sound or fields == WINNER_FIRST:
            return sound, 1.0
        value = row.get("label")
        label = WORDS[value] if isinstance(value, str) and value in WORDS else parse_number(value)
        if value is None:
            self.remark(name, NO_LABEL)
            self._other_keys.update(key for key in row if key not in NOT_LABELS)
        elif label is None or not 0 <= label <= 1:
            problem = f"label is {short(value)}, neither in [0, 1] nor a, b or tie"
            self.refuse(name, problem, "label not readable")
            return False, None
        return sound, label

    def _name_other_keys(self) -> None:
        """Name other keys of unlabelled rows in the remark on these rows: the label may stand under one of them."""
        if self._other_keys:
            keys = [f"{short(key)} ({rows} rows)" for key, rows in self._other_keys.most_common(MOST_KEYS)]
            keys += [f"{more} other keys"] if (more := len(self._other_keys) - MOST_KEYS) > 0 else []
            told = f"a label is read from 'label', or from 'chosen' and 'rejected', not from {', '.join(keys)}"
            self.rename_no_label(told)

    def rename_no_label(self, told: str) -> None:
        """Put what is known of the label of unlabelled rows into the remark on them."""
        reason = f"unlabelled ({told})"
        self.remarks[reason] = self.remarks.pop(NO_LABEL)
        self.named[reason] = self.named.pop(NO_LABEL)

    def _parse_weight(self, name: str, value: Any, sound: bool) -> tuple[bool, float]:
        """Return whether the row has broken no rule so far, and its weight, 1 by default."""
        weight = 1.0 if value is None else parse_number(value)
        if sound and (weight is None or weight < 0):
            self.refuse(name, f"weight is {short(value)}, not a number of 0 or more", "weight not readable")
            return False, 1.0
        return sound, weight if sound and weight is not None else 1.0

    def _parse_confidence(self, value: Any) -> float | None:
        number = parse_number(value)
        if value is not None and (number is None or not 0 <= number <= 1):
            self.remarks["confidence not readable"] += 1
            return None
        return number
