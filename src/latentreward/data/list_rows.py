"""Reading of lists of images in JSON, CSV or TSV, and choice of the columns with paths and prompts."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latentreward.data.readers.folders import read_lines
from latentreward.data.readers.json_rows import parse_line, parse_rows, short
from latentreward.errors import InputError, did_you_mean
from latentreward.storage.texts import read_table, read_text

IMAGE_COLUMNS = ("file_name", "file", "path", "image", "name")
"""Usual names of the column with paths, in order of preference.

``image`` comes after ``file``, because ``image`` is a number in the table of ``latentreward generate``.
"""
PROMPT_COLUMNS = ("prompt", "caption", "text")

Line = tuple[int, dict[str, Any] | str]
"""Number of a line (of a JSON list's item, from 1), with its row as a dict or, for an unreadable line, a description of
the problem."""


def read_rows(file: Path) -> list[Line]:
    """Read every line that is not blank, as its number with its row or a description of the problem.

    Raises:
        InputError: If the file does not exist, is empty, or has no readable line.
    """
    suffix = file.suffix.lower()
    lines: list[Line]
    if suffix == ".jsonl":
        lines = [(number, parse_line(line)) for number, line in read_lines(file)]
    elif suffix == ".json":
        items = parse_rows(_text(file).encode(), f"images: {file}", "give a list of images as one JSON list of objects")
        lines = [
            (number, row if isinstance(row, dict) else f"{short(row)} is no JSON object")
            for number, row in enumerate(items, start=1)
        ]
    else:
        lines = list(_table_lines(file, suffix))
    if not lines:
        raise InputError(f"images: {file} holds no row; give a list with a row per image")
    if all(isinstance(row, str) for _, row in lines):
        number, problem = lines[0]
        raise InputError(f"images: no row of {file} can be read; line {number}: {problem}; correct it")
    return lines


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except OSError as error:
        raise InputError(f"images: {file}: {error.strerror}; give a list of images") from error


def _table_lines(file: Path, suffix: str) -> Iterator[Line]:
    line = 0
    try:
        reader = read_table(_text(file), suffix)
        for row in reader:
            line = reader.line_num
            yield line, row if None not in row else f"more fields than the header's {len(row) - 1}"
    except csv.Error as error:
        raise InputError(f"images: {file}, after line {line}: {error}; correct it") from error


def find_columns(
    file: Path,
    lines: Iterable[Line],
    asked: Sequence[str | None],
    with_prompts: bool = True,
) -> tuple[str, str]:
    """Choose the columns with paths and with prompts: those ``asked`` for, else the first of the usual names.

    The second name is empty if no column ``with_prompts`` is needed.

    Raises:
        InputError: If a column is missing.
    """
    rows = (row for _, row in lines if not isinstance(row, str))
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    image = _column(file, names, asked[0], IMAGE_COLUMNS, "image_column")
    return image, _column(file, names, asked[1], PROMPT_COLUMNS, "prompt_column") if with_prompts else ""


def _column(file: Path, names: Sequence[str], asked: str | None, usual: Sequence[str], setting: str) -> str:
    if asked is not None:
        if asked not in names:
            raise InputError(f"{setting}: {file} has no column {asked!r}{did_you_mean(asked, names)}")
        return asked
    found = next((name for name in usual if name in names), None)
    if found is None:
        there = ", ".join(names[:12])
        prompt = ", or give one prompt for all images with --prompt" if setting == "prompt_column" else ""
        raise InputError(
            f"images: {file} has no column {', '.join(usual[:-1])} or {usual[-1]} (it has: {short(there)}); name it "
            f"with --{setting}{prompt}"
        )
    return found
