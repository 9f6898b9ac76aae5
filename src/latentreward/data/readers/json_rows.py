"""Rows of JSON files: a list of objects, whose texts, numbers and paths are looked at before they are believed."""

import json
import math
import os
from pathlib import Path
from typing import Any

from latentreward.data.images import NO_IMAGE, OUTSIDE
from latentreward.data.readers.base import MAX_VOTES, SideExchangingReader
from latentreward.errors import InputError

ARRAY_REMEDY = "give the published file, one JSON list of objects"


class JSONReader(SideExchangingReader):
    """A reader of JSON objects: what is refused in them, whatever the format."""

    def check_row(self, pair_id: str, row: Any) -> tuple[dict[str, Any], bool]:
        """The row, without what breaks a rule, and whether nothing did.

        A row that is no object, or whose ``prompt`` is no text or too long, falls under ``on_error``; a null or missing
        prompt is remarked.
        """
        if not isinstance(row, dict):
            self.refuse(pair_id, f"the row is {short(row)}, not an object", "row is no object")
            return {}, False
        prompt = row.get("prompt")
        if prompt is None:
            self.remarks["null prompt read as empty"] += 1
        elif not isinstance(prompt, str):
            self.refuse(pair_id, f"prompt is {short(prompt)}, not text", "prompt is no text")
            return {**row, "prompt": None}, False
        elif len(prompt) > self.max_prompt_chars:
            self.refuse_long_prompt(pair_id, len(prompt))
            return {**row, "prompt": None}, False
        return row, True

    def check_votes(self, pair_id: str, field: str, votes: tuple[int, int] | None) -> bool:
        """Whether there are no more than ``MAX_VOTES`` for an image; more fall under ``on_error``."""
        if votes is None or max(votes) <= MAX_VOTES:
            return True
        self.refuse(pair_id, f"{field} is {short(list(votes))}, more than {MAX_VOTES} for an image", "too many votes")
        return False

    def check_path(self, pair_id: str, field: str, path: Any, folder: Path) -> None:
        """Stop at a path that is none, or leads out of ``folder``; without ``on_error="raise"`` decoding counts it."""
        if self.on_error != "raise":
            return
        if not isinstance(path, str) or not path:
            self.refuse(pair_id, f"{field} is {short(path)}, not a path", NO_IMAGE)
        elif escapes(path):
            self.refuse(pair_id, f"{field} {short(path)} leads out of {folder}", OUTSIDE)


def load_rows(file: Path) -> list[Any]:
    """The list that a JSON file holds.

    Raises:
        InputError: If there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise InputError(f"split: no file {file}; set root to the unpacked data set, and split to a file in it")
    return parse_rows(file.read_bytes(), str(file))


def parse_rows(data: bytes, name: str) -> list[Any]:
    """The list that JSON bytes hold; ``name`` is for the error message.

    Raises:
        InputError: If they hold something else.
    """
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error}); {ARRAY_REMEDY}") from error
    if not isinstance(rows, list):
        raise InputError(f"{name}: holds {short(rows)}; {ARRAY_REMEDY}")
    return rows


def parse_json(text: str, otherwise: Any) -> Any:
    """The value that a text holds as JSON, or ``otherwise`` if it holds none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def parse_number(value: Any) -> float | None:
    """A finite number, or a text that is one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parse_votes(value: Any) -> tuple[int, int] | None:
    """Two counts, also as texts; None for anything else."""
    counts = [parse_number(item) for item in value] if isinstance(value, list) else []
    if len(counts) != 2 or not all(count is not None and count >= 0 and count % 1 == 0 for count in counts):
        return None
    return int(counts[0] or 0), int(counts[1] or 0)


def parse_text(value: Any) -> str | None:
    """The text with lone surrogates, which no tokenizer takes, replaced; None for anything else."""
    if not isinstance(value, str):
        return None
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def escapes(path: str) -> bool:
    """Whether a path leads out of its folder by itself, links aside."""
    return path.startswith("/") or (".." in path and Path(os.path.normpath(path)).parts[:1] == ("..",))


def short(value: Any) -> str:
    """A value for an error message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
