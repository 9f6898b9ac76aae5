"""Reading of rows of prompts or images from JSON lines, a JSON list, CSV or TSV, and choice of their columns."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latentreward.core.errors import InputError, did_you_mean, errors_at
from latentreward.core.storage.json_files import read_table, read_text
from latentreward.data.readers.folders import read_lines
from latentreward.data.readers.json_rows import as_object, parse_rows, parse_value, short

IMAGE_COLUMNS = ("file_name", "file", "path", "image", "name")
"""Usual names of the column with paths, in order of preference.

``image`` comes after ``file``, because ``image`` is a number in the table of ``latentreward generate``.
"""
PROMPT_COLUMNS = ("prompt", "caption", "text")

Line = tuple[int, dict[str, Any] | str]
"""Number of a line (of a JSON list's item, from 1), with its row as a dict or, for an unreadable line, a description of
the problem."""


def read_rows(file: Path, remedy: str, as_list: Callable[[Any], Any] | None = None) -> Iterator[tuple[int, Any, str]]:
    """Yield the rows of a ``.json``, ``.csv`` or ``.tsv`` file, or JSON lines; of JSON, a list that ``as_list`` makes.

    Yields:
        Number of the line, or of the list's item from 1; its value, a dict in tables; and what is wrong with it, empty
        if nothing is.

    Raises:
        InputError: If the file as a whole cannot be read; ``remedy`` tells what to do about JSON that is no list.
    """
    suffix, number = file.suffix.lower(), 0
    if suffix == ".json":
        items = parse_rows(read_text(file), str(file), remedy, as_list)
        yield from ((number, item, "") for number, item in enumerate(items, start=1))
    elif suffix not in (".csv", ".tsv"):
        yield from ((number, *parse_value(line)) for number, line in read_lines(file))
    else:
        try:
            for row in (table := read_table(read_text(file), suffix)):
                number, more = table.line_num, f"more fields than the header's {len(row) - 1}; put texts with commas "
                yield number, row, f"{more}in quotation marks" if None in row else ""
        except csv.Error as error:
            raise InputError(f"{file}, after line {number}: {error}; correct it") from error


def read_objects(file: Path) -> list[Line]:
    """Read every line of a list of images that is not blank, as its number with its row or what is wrong with it.

    Raises:
        InputError: If the file does not exist, is empty, or has no readable line.
    """
    with errors_at("images: "):
        try:
            rows = read_rows(file, "give a list of images as one JSON list of objects")
            lines = [(number, as_object(value, problem)) for number, value, problem in rows]
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}; give a list of images") from error
        if not lines:
            raise InputError(f"{file} holds no row; give a list with a row per image")
        if all(isinstance(row, str) for _, row in lines):
            number, problem = lines[0]
            raise InputError(f"no row of {file} can be read; line {number}: {problem}; correct it")
    return lines


def find_columns(
    file: Path, lines: Iterable[Line], asked: Sequence[str | None], with_prompts: bool = True
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
