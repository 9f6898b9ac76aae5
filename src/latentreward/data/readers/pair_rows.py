"""Parser of rows that each have a prompt, two images, and a label or the order of the images."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from latentreward.data.readers.base import MAX_VOTES, PairReader
from latentreward.data.readers.json_rows import (
    MOST_SOURCES,
    NO_OBJECT,
    SOURCES,
    check_row,
    list_sources,
    parse_number,
    parse_text,
    short,
)
from latentreward.data.readers.rows import pack

INDEX = pa.schema(
    {
        "row": pa.int64(),
        **dict.fromkeys(("pair_id", "prompt", "image_a", "image_b"), pa.large_string()),
        "label": pa.float64(),
        "winner_first": pa.bool_(),
        "weight": pa.float64(),
        "votes_a": pa.int64(),
        "votes_b": pa.int64(),
        "confidence": pa.float64(),
        "model_a": pa.string(),
        "model_b": pa.string(),
        "noise_a": pa.string(),
        "noise_b": pa.string(),
        "group_id": pa.large_string(),
        "split": pa.large_string(),
        "sources": pa.list_(pa.large_string()),
    }
)
WINNER_FIRST, BY_LABEL = ("chosen", "rejected"), ("image_a", "image_b")
WORDS = {"a": 1.0, "b": 0.0, "tie": 0.5}
MODELS = ("model_a", "model_b")
NOISES = ("noise_a", "noise_b")
TEXTS = (*MODELS, *NOISES, "group_id", "split")
NOT_LABELS = (*WINNER_FIRST, *BY_LABEL, *TEXTS, *SOURCES, "prompt", "label", "confidence", "weight", "pair_id")
"""Keys under which nobody looks for a label, beside the keys of labels themselves."""
COLUMNS = {name: name for name in (*NOT_LABELS, "votes")}
"""Field → column of pairs of your own; :class:`~latentreward.data.JSONLPairReader` describes them."""
NO_LABEL = "unlabelled (no label)"
MOST_KEYS = 3
"""Other keys of unlabelled rows that a remark names; the rest are counted."""


class PairRowParser:
    """Parser of rows with ``chosen`` and ``rejected``, or with ``image_a``, ``image_b`` and ``label``.

    Args:
        reader: Reader whose ``on_error`` applies to the rows.
        check_image: Function of a row's name, a column of images and its value that applies ``on_error`` to a value
            that cannot be an image; None checks nothing.
        columns: Field, one of ``COLUMNS`` → column of the rows. Other fields are not read.
    """

    def __init__(
        self,
        reader: PairReader,
        check_image: Callable[[str, str, Any], None] | None = None,
        columns: Mapping[str, str] = COLUMNS,
    ) -> None:
        self.reader, self.check_image, self.columns = reader, check_image, columns
        self.sources = [columns[field] for field in SOURCES if field in columns and reader.sources == "read"]
        self._other_keys: Counter[str] = Counter()
        self._seen: set[str] = set()

    def table(self, rows: Iterable[tuple[str, int, Any]]) -> pa.Table:
        """Parse all rows, each given as the arguments of :meth:`parse`, into a table with the columns ``INDEX``."""
        table = pack((self.parse(*row) for row in rows), INDEX)
        self._seen.clear()
        if self._other_keys:
            keys = [f"{short(key)} ({rows} rows)" for key, rows in self._other_keys.most_common(MOST_KEYS)]
            keys += [f"{more} other keys"] if (more := len(self._other_keys) - MOST_KEYS) > 0 else []
            told = f"a label is read from 'label', or from 'chosen' and 'rejected', not from {', '.join(keys)}"
            self.rename_no_label(told)
        return table

    def parse(self, name: str, number: int, content: Any, stream: bool = False) -> dict[str, Any] | None:
        """Parse one row, applying ``on_error``, to values by column of ``INDEX``; None leaves the row out.

        Args:
            name: Name of the row without a ``pair_id``.
            number: Number of the row.
            content: The row as a dict; a text says why it is none.
            stream: Whether a ``pair_id`` may occur again.
        """
        reader, columns = self.reader, self.columns
        if isinstance(content, str):
            reader.refuse(name, content, NO_OBJECT)
            content, sound = {}, False
        else:
            content, sound = check_row(reader, name, content, self.sources)
        row = {field: content.get(column) for field, column in columns.items()}
        pair_id = parse_text(row.get("pair_id")) or name
        if pair_id in self._seen:
            if sound:
                reader.refuse(name, f"pair_id {short(pair_id)} occurred before", "pair_id occurs twice")
            pair_id, sound = name, False
        labelled = BY_LABEL[0] in columns and not any(columns[field] in content for field in WINNER_FIRST)
        images = BY_LABEL if labelled else WINNER_FIRST
        if sound and self.check_image is not None:
            for field in images:
                self.check_image(name, columns[field], row[field])
        sound, sources = self._parse_sources(name, content, sound)
        label: float | None = 1.0
        if labelled and sound:
            sound, label = self._parse_label(name, row["label"], content)
        elif not labelled and row.get("label") is not None:
            reader.remark(name, "label not read (chosen and rejected say who won)")
        weight = 1.0 if row.get("weight") is None else parse_number(row["weight"])
        if sound and (weight is None or weight < 0):
            reader.refuse(name, f"weight is {short(row['weight'])}, not a number of 0 or more", "weight not readable")
            sound = False
        votes = None
        if sound:
            sound, votes = self._parse_votes(name, row.get("votes"))
        if not sound and reader.on_error == "skip":
            return None
        if "pair_id" in columns and not stream:
            self._seen.add(pair_id)
        return {
            "row": number,
            "pair_id": pair_id,
            "prompt": parse_text(row["prompt"]),
            "image_a": parse_text(row[images[0]]),
            "image_b": parse_text(row[images[1]]),
            "label": label if sound else None,
            "winner_first": not labelled,
            "weight": weight if sound else 1.0,
            "votes_a": votes and votes[0],
            "votes_b": votes and votes[1],
            "confidence": self._parse_confidence(name, row.get("confidence")),
            **{field: parse_text(row.get(field)) for field in TEXTS},
            "sources": sources or None,
        }

    def _parse_label(self, name: str, value: Any, content: dict[str, Any]) -> tuple[bool, float | None]:
        """Return whether the row is still valid, and the label of its first image; None if it is unlabelled."""
        label = WORDS[value] if isinstance(value, str) and value in WORDS else parse_number(value)
        if value is None:
            self.reader.remark(name, NO_LABEL)
            self._other_keys.update(key for key in content if key not in NOT_LABELS)
        elif label is None or not 0 <= label <= 1:
            problem = f"label is {short(value)}, neither in [0, 1] nor a, b or tie"
            self.reader.refuse(name, problem, "label not readable")
            return False, None
        return True, label

    def _parse_votes(self, name: str, value: Any) -> tuple[bool, tuple[int, int] | None]:
        """Return whether the row is still valid, and its votes, two counts; None if there are none that can be read."""
        column, counts = self.columns["votes"], list(map(parse_number, value)) if isinstance(value, list) else []
        votes = [int(count) for count in counts if count is not None and count >= 0 and count % 1 == 0]
        if len(votes) != 2 or len(counts) != 2:
            if value is not None:
                self.reader.remark(name, f"{column} not readable")
            return True, None
        if max(votes) > MAX_VOTES:
            problem = f"{column} is {short(votes)}, more than {MAX_VOTES} for an image"
            self.reader.refuse(name, problem, "too many votes")
            return False, None
        return True, (votes[0], votes[1])

    def _parse_sources(self, name: str, content: dict[str, Any], sound: bool) -> tuple[bool, list[str]]:
        """Return whether the row is still valid, and the pictures to edit, none for a text alone."""
        field, values = list_sources(content, self.sources)
        if sound and len(values) > MOST_SOURCES:
            problem = f"{field} has {len(values)} pictures to edit, more than {MOST_SOURCES}"
            self.reader.refuse(name, problem, "too many pictures to edit")
            sound = False
        if sound and self.check_image is not None:
            for value in values:
                self.check_image(name, field, value)
        return sound, [parse_text(value) or "" for value in values[:MOST_SOURCES]]

    def rename_no_label(self, told: str) -> None:
        """Put what is known of the label of unlabelled rows into the remark on them."""
        reason, reader = f"unlabelled ({told})", self.reader
        reader.remarks[reason] = reader.remarks.pop(NO_LABEL)
        reader.named[reason] = reader.named.pop(NO_LABEL)

    def _parse_confidence(self, name: str, value: Any) -> float | None:
        number = parse_number(value)
        if value is None or (number is not None and 0 <= number <= 1):
            return number
        self.reader.remark(name, "confidence not readable")
        return None
