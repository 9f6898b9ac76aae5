"""Reader of HPDv3 and HPDv3++: JSON files with pairs of image files, the preferred one first, and votes on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from latentreward.contracts import PreferencePair
from latentreward.data.readers.base import exchange_sides
from latentreward.data.readers.groups import file_image
from latentreward.data.readers.json_rows import JSONReader, load_rows, parse_json, parse_number, parse_text, parse_votes
from latentreward.errors import InputError

INDEX = pa.schema(
    {
        "row": pa.int64(),
        "labelled": pa.bool_(),
        "prompt": pa.large_string(),
        "path1": pa.large_string(),
        "path2": pa.large_string(),
        "model1": pa.string(),
        "model2": pa.string(),
        "votes1": pa.int64(),
        "votes2": pa.int64(),
        "confidence": pa.float64(),
    }
)
NULL_TEXTS = ("", "null", "none", "nan")


class HPDv3Reader(JSONReader):
    """Reader of one JSON file of HPDv3, or of the pairs of HPDv3++.

    ``path1`` is the preferred image, as published, even where the majority of votes contradicts it: the authors
    weighted annotators by ability. A null or missing prompt is read as an empty prompt. Unreadable votes and
    confidences are read as not published. A row falls under ``on_error`` if it is not a JSON object, its prompt is not
    text or too long, or an image has more than a billion votes. A path that is missing or leads out of ``root`` raises
    InputError in the constructor under ``on_error: raise``; otherwise the problem is found when the image is decoded,
    as is a missing file. Absolute paths inside ``root`` are read. Duplicate rows are kept.

    HPDv3++ (``Junjun2333/HPDv3-PlusPlus``) has the same rows, with votes and confidence as texts or null, in subfolders
    of ``root``: ``train/train_aes``, ``train/train_tf``, ``test/test_aes`` and ``test/test_tf`` compare aesthetics or
    text following. Its ``rollout.json`` holds single images without labels and is not read.

    The constructor parses the whole JSON file and keeps it in a compact form.

    Args:
        root: Folder with the JSON files and ``images/``; images outside it are not opened.
        split: Name of the JSON file without suffix: ``all``, ``train`` or ``test``; of HPDv3++ with its subfolder.
        min_confidence: Leave out rows with a lower confidence than this, e.g. 0.95; rows without confidence are kept.
        label: ``"hard"`` labels the image of ``path1`` with 1. ``"votes"`` uses its fraction of the votes as the label,
            and 1 for a row without votes.
        options: See :class:`~latentreward.data.readers.base.SideExchangingReader`.

    Raises:
        InputError: If the file is missing, is not a JSON list, has no rows left, or breaks a rule above under
            ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(
        self,
        root: str,
        split: str,
        *,
        min_confidence: float | None = None,
        label: Literal["hard", "votes"] = "hard",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root, self.split, self.label = Path(root), split, label
        self._file = self.root / f"{split}.json"
        self._table = self._build_index(load_rows(self._file), min_confidence)
        if not len(self):
            raise InputError(f"split: {self._file} has no rows left; check the file and min_confidence")
        self.report(str(self._file))

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> PreferencePair:
        row = {name: self._table.column(name)[index].as_py() for name in INDEX.names}
        votes = None if row["votes1"] is None else (row["votes1"], row["votes2"])
        pair = PreferencePair(
            pair_id=self._pair_id(row["row"]),
            prompt=row["prompt"],
            image_a=file_image(self.root, row["path1"]),
            image_b=file_image(self.root, row["path2"]),
            label_a=self._label(votes) if row["labelled"] else None,
            votes=votes,
            confidence=row["confidence"],
            model_a=row["model1"],
            model_b=row["model2"],
            source="hpdv3",
            split=self.split,
        )
        return pair.swapped() if self.is_exchanged(pair.pair_id) else pair

    def labelled(self) -> np.ndarray:
        """Return whether each row has a label, ``(len,)`` bool; false only for placeholders of bad rows."""
        return self._table.column("labelled").to_numpy()

    def prompts(self) -> list[str]:
        """Return the raw prompt of every row."""
        return self._table.column("prompt").to_pylist()

    def pair_ids(self) -> list[str]:
        """Return the ``pair_id`` of every row, ``FILE:ROW``."""
        return [self._pair_id(row) for row in self._table.column("row").to_pylist()]

    def facts(self) -> dict[str, list[Any]]:
        """Return models, votes and confidence of every row, see :meth:`PairReader.facts`."""
        names = {"model_a": "model1", "model_b": "model2", "votes_a": "votes1", "votes_b": "votes2"}
        facts = {name: self._table.column(column).to_pylist() for name, column in names.items()}
        return {**exchange_sides(facts, self.exchanged()), "confidence": self._table.column("confidence").to_pylist()}

    def _build_index(self, rows: list[Any], min_confidence: float | None) -> pa.Table:
        columns: dict[str, list[Any]] = {name: [] for name in INDEX.names}
        for number, row in enumerate(rows):
            entry = self._parse(number, row)
            if entry is None:
                continue
            confidence = entry["confidence"]
            if min_confidence is not None and confidence is not None and confidence < min_confidence:
                self.skipped["confidence below the threshold"] += 1
                continue
            for name, values in columns.items():
                values.append(entry[name])
        return pa.table(columns, schema=INDEX).combine_chunks()

    def _parse(self, number: int, row: Any) -> dict[str, Any] | None:
        """Parse one row, applying ``on_error``, to values by column of ``INDEX``; None leaves the row out."""
        row, sound = self._check(number, row)
        if not sound and self.on_error == "skip":
            return None
        votes1, votes2 = self._remark_unreadable("choice_dist", row, _parse_votes) or (None, None)
        texts = {name: parse_text(row.get(name)) for name in ("path1", "path2", "model1", "model2")}
        return {
            "row": number,
            "labelled": sound,
            "prompt": parse_text(row.get("prompt")) or "",
            **texts,
            "votes1": votes1,
            "votes2": votes2,
            "confidence": self._remark_unreadable("confidence", row, parse_number),
        }

    def _check(self, number: int, row: Any) -> tuple[dict[str, Any], bool]:
        """Return the row with fields that break a rule set to None, and whether no rule was broken."""
        row, sound = self.check_row(self._pair_id(number), row)
        for name in ("path1", "path2") if sound else ():
            self.check_path(self._pair_id(number), name, row.get(name), self.root)
        if sound and not self.check_votes(self._pair_id(number), "choice_dist", _parse_votes(row.get("choice_dist"))):
            return {**row, "choice_dist": None}, False
        return row, sound

    def _remark_unreadable(self, name: str, row: dict[str, Any], parse: Callable[[Any], Any]) -> Any:
        value = row.get(name)
        if value is None or (isinstance(value, str) and value.strip().lower() in NULL_TEXTS):
            return None
        parsed = parse(value)
        if parsed is None:
            self.remarks[f"{name} not readable"] += 1
        return parsed

    def _pair_id(self, row: int) -> str:
        return f"{self._file.name}:{row}"

    def _label(self, votes: tuple[int, int] | None) -> float:
        return votes[0] / sum(votes) if self.label == "votes" and votes and sum(votes) else 1.0


def _parse_votes(value: Any) -> tuple[int, int] | None:
    return parse_votes(parse_json(value, None) if isinstance(value, str) else value)
