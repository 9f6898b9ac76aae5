"""Reader of JSON lines: pairs of image files of your own, one object per line."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentreward.contracts import PreferencePair
from latentreward.data.readers.base import exchange_sides
from latentreward.data.readers.folders import read_lines
from latentreward.data.readers.groups import file_image
from latentreward.data.readers.json_rows import JSONReader, parse_json, parse_number, parse_text, parse_votes, short
from latentreward.errors import InputError

INDEX = pa.schema(
    {
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
        "split": pa.large_string(),
    }
)
WINNER_FIRST, BY_LABEL = ("chosen", "rejected"), ("image_a", "image_b")
WORDS = {"a": 1.0, "b": 0.0, "tie": 0.5}
NOT_LABELS = (*WINNER_FIRST, *BY_LABEL, "prompt", "label", "confidence", "weight", "pair_id", "split")
"""Keys under which nobody looks for a label, beside the keys of labels themselves."""
NO_LABEL = "unlabelled (no label)"
ROWS = 1 << 14
"""Rows that are parsed before they are packed into a part of the table."""
MOST_KEYS = 3
"""Other keys of unlabelled rows that a remark names; the rest are counted."""


class JSONLPairReader(JSONReader):
    """Reader of pairs of image files from a file of JSON lines.

    A line has a ``prompt`` and either ``chosen`` and ``rejected``, or ``image_a``, ``image_b`` and ``label``::

        {"prompt": "a cat", "chosen": "images/1.jpg", "rejected": "images/2.jpg"}
        {"prompt": "a cat", "image_a": "images/1.jpg", "image_b": "images/2.jpg", "label": 0.5}

    ``label`` is the probability in [0, 1] that a is preferred (½ for a tie), or ``"a"``, ``"b"`` or ``"tie"``. A line
    with a null or missing label is unlabelled, also if it has ``votes``; other keys are not read. Optional fields are
    ``votes`` ([a, b] or [chosen, rejected]), ``confidence`` in [0, 1], ``weight`` (of the pair in the loss, 0 or more),
    ``pair_id`` (default ``FILE:LINE``) and ``split`` (a text, by which a cache tells the splits of one file apart).

    Paths are relative to ``root``. A null or missing prompt is read as an empty prompt. Unreadable ``votes`` and
    ``confidence`` are ignored. Blank lines are ignored. A line falls under ``on_error`` if it is not an object, if its
    prompt is not text or too long, if its label or weight is out of range, if an image has more than a billion votes,
    or if its ``pair_id`` occurred before. A path that is missing or leads out of ``root`` raises InputError in the
    constructor under ``on_error: raise``; otherwise the problem is found when the image is decoded, as is a missing
    file.

    Args:
        file: Path of the file. Keys of a line: ``prompt``; ``chosen`` and ``rejected`` (paths), or ``image_a``,
            ``image_b`` (paths) and ``label`` (probability that a is preferred, or ``a``, ``b``, ``tie``); optionally
            ``votes``, ``confidence``, ``weight``, ``pair_id``, ``split``.
        root: Folder that paths are relative to and that all images must lie in; by default the file's folder.
        split: Name of the split of lines without their own.
        options: See :class:`~latentreward.data.readers.base.SideExchangingReader`. In lines with ``chosen`` and
            ``rejected``, the chosen image is a or b at random; lines with ``image_a`` and ``image_b`` stay as written.

    Raises:
        InputError: If the file is missing, no line is left, or a line breaks a rule above under ``on_error: raise``.
    """

    def __init__(self, file: str, root: str | None = None, split: str = "train", **options: Any) -> None:
        super().__init__(**options)
        self.split, self._file = split, Path(file)
        self._root = Path(root) if root else self._file.parent
        self._other_keys: Counter[str] = Counter()
        seen: set[str] = set()
        entries = (self._parse(line, text, seen) for line, text in read_lines(self._file))
        rows, parts = filter(None, entries), [INDEX.empty_table()]
        while some := list(islice(rows, ROWS)):  # all rows at once would be Python's objects, ten times as large
            columns = zip(*some, strict=True)
            parts.append(pa.table(dict(zip(INDEX.names, columns, strict=True)), schema=INDEX))
        self._table = pa.concat_tables(parts)
        if not len(self):
            raise InputError(f"file: {file} has no lines left; give one JSON object per line")
        self._name_other_keys()
        self.report(str(file))

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> PreferencePair:
        row = {name: self._table.column(name)[index].as_py() for name in INDEX.names}
        pair = PreferencePair(
            pair_id=row["pair_id"],
            prompt=row["prompt"],
            image_a=file_image(self._root, row["path_a"]),
            image_b=file_image(self._root, row["path_b"]),
            label_a=row["label"],
            weight=row["weight"],
            votes=None if row["votes_a"] is None else (row["votes_a"], row["votes_b"]),
            confidence=row["confidence"],
            source=self._file.name,
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
        """Return the ``pair_id`` of every row, ``FILE:LINE`` if its line has none."""
        return self._table.column("pair_id").to_pylist()

    def facts(self) -> dict[str, list[Any]]:
        """Return ``votes_a``, ``votes_b`` and ``confidence``, each a list with one value per row, None if not given."""
        facts = {name: self._table.column(name).to_pylist() for name in ("votes_a", "votes_b")}
        return {**exchange_sides(facts, self.exchanged()), "confidence": self._table.column("confidence").to_pylist()}

    def exchanged(self) -> np.ndarray:
        """Return for every row whether the chosen image is b, not a; always false for lines with ``image_a``."""
        if self._exchanged is None:
            rows = zip(self._table.column("winner_first").to_pylist(), self.pair_ids(), strict=True)
            self._exchanged = np.array([first and self.is_exchanged(name) for first, name in rows], dtype=bool)
        return self._exchanged

    def _parse(self, line: int, text: str, seen: set[str]) -> tuple[Any, ...] | None:
        """Parse one line, applying ``on_error``, to values in the order of ``INDEX``; None leaves the line out."""
        name = f"{self._file.name}:{line}"
        row, sound = self.check_row(name, parse_json(text, text.strip()))
        pair_id = parse_text(row.get("pair_id")) or name
        if sound and pair_id in seen:
            self.refuse(name, f"pair_id {short(pair_id)} occurred before", "pair_id occurs twice")
            pair_id, sound = name, False
        fields = WINNER_FIRST if any(field in row for field in WINNER_FIRST) else BY_LABEL
        for field in fields if sound else ():
            self.check_path(name, field, row.get(field), self._root)
        sound, label = self._parse_label(name, row, fields, sound)
        sound, weight = self._parse_weight(name, row.get("weight"), sound)
        votes = parse_votes(row.get("votes"))
        if sound and votes is None and row.get("votes") is not None:
            self.remarks["votes not readable"] += 1
        sound = sound and self.check_votes(name, "votes", votes)
        if not sound and self.on_error == "skip":
            return None
        seen.add(pair_id)
        counts = votes if sound and votes is not None else (None, None)
        paths = [parse_text(row.get(field)) for field in fields]
        prompt, confidence = parse_text(row.get("prompt")) or "", self._parse_confidence(row.get("confidence"))
        facts = (label if sound else None, fields == WINNER_FIRST, weight, *counts, confidence)
        return pair_id, prompt, *paths, *facts, parse_text(row.get("split"))

    def _parse_label(
        self, name: str, row: dict[str, Any], fields: tuple[str, str], sound: bool
    ) -> tuple[bool, float | None]:
        """Return whether the row has broken no rule so far, and the label of its first image; None if unlabelled."""
        if not sound or fields == WINNER_FIRST:
            return sound, 1.0
        value = row.get("label")
        label = WORDS[value] if isinstance(value, str) and value in WORDS else parse_number(value)
        if value is None:
            self.remarks[NO_LABEL] += 1
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
            self.remarks[f"unlabelled ({told})"] = self.remarks.pop(NO_LABEL)

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
