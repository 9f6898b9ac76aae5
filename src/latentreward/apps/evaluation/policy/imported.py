"""Import of pictures that were made elsewhere: a folder with a table that names their prompts."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.data import ImageError, decode_image
from latentreward.data.alignment.prompt_files import PromptRow, read_prompt_rows
from latentreward.data.images import file_image, image_bytes
from latentreward.data.readers.base import MAX_PROMPT_CHARS
from latentreward.reward.scorers.tools import JudgedPicture

TABLES = ("images.csv", "images.jsonl")


@dataclass(frozen=True)
class ImportedPictures:
    """Pictures of a folder, matched with a set of prompts."""

    folder: Path
    # (index of the prompt, number of the picture of that prompt) → picture
    pictures: dict[tuple[int, int], JudgedPicture]
    left_aside: int  # number of pictures that are not wanted: of other prompts or numbers
    problems: dict[str, int]  # reason → number of pictures that could not be read


def find_pictures(folder: Path, max_prompt_chars: int = MAX_PROMPT_CHARS) -> list[PromptRow]:
    """Read the table of a folder of pictures, ``images.csv`` or ``images.jsonl``.

    Its columns are ``file`` and ``prompt``, optionally ``place`` and ``image`` (numbers from 0), and of edits
    ``source_images`` with paths in the folder, as ``latentreward generate`` writes them.
    """
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        raise InputError(f"images: there is no {folder / TABLES[0]}; write it, with columns file and prompt")
    rows = read_prompt_rows(str(table), "images", max_prompt_chars)
    for row in rows:
        if not isinstance(file := row.fields.get("file"), str) or not file:
            raise InputError(f"images: {table}: prompt {row.prompt[:60]!r} has no file; write a column of paths")
        for name in ("place", "image"):
            if not re.fullmatch(r"\s*(\d{1,15}(\.0)?)?\s*", str(_told(row, name))):
                problem = f"{name} {row.fields[name]!r} of {file} is not a whole number"
                raise InputError(f"images: {table}: {problem}; write numbers from 0")
    return rows


def match(found: Sequence[PromptRow], rows: Sequence[PromptRow]) -> dict[tuple[int, int], str]:
    """Match pictures with a set of prompts: (index of the prompt, number of the picture of that prompt) → file.

    Pictures are matched by the text of their prompt, and edits also by the bytes of the pictures that were edited. If a
    prompt occurs k times in the set, its pictures are cut into k runs of equal length, the first for the first
    occurrence.
    """

    @cache
    def key_of(prompt: str) -> tuple[str, ...]:
        return (str(prompt), *(digest([image_bytes(image)]) for image in sources_of(prompt)))

    pictures, places = defaultdict(list), defaultdict(list)
    for row in found:
        pictures[key_of(row.prompt)].append(row)
    for place, row in enumerate(rows):
        places[key_of(row.prompt)].append(place)
    matched: dict[tuple[int, int], str] = {}
    for key in pictures.keys() & places.keys():
        own = sorted(pictures[key], key=lambda row: [float(_told(row, name) or 0) for name in ("place", "image")])
        size = -(-len(own) // len(places[key]))
        for start, place in zip(range(0, len(own), size), places[key], strict=False):
            run = own[start : start + size]
            told = [_told(row, "image") for row in run]
            known = "" not in told and len(set(told)) == len(run)
            numbers = map(int, map(float, told)) if known else range(len(run))
            matched |= {(place, number): row.fields["file"] for number, row in zip(numbers, run, strict=True)}
    return matched


def import_pictures(
    folder: Path, found: Sequence[PromptRow], rows: Sequence[PromptRow], wanted: Sequence[tuple[int, int]]
) -> ImportedPictures:
    """Match a folder's pictures with a set of prompts, and decode the wanted ones to find damaged files.

    Damaged pictures are left out and counted in ``problems``. ``wanted`` pictures are told by their prompt's index in
    ``rows`` and their number among its pictures.
    """
    asked = set(wanted)
    matched = {name: file for name, file in sorted(match(found, rows).items()) if name in asked}
    pictures, problems = {}, Counter[str]()
    for (place, image), file in matched.items():
        try:
            decode_image(reference := file_image(folder, file))
        except ImageError as error:
            problems[error.problem] += 1
            continue
        pictures[place, image] = judged(place, image, file, reference.path or folder, rows[place])
    return ImportedPictures(folder, pictures, len(found) - len(matched), dict(problems))


def judged(place: int, image: int, file: str, path: Path, row: PromptRow) -> JudgedPicture:
    """Return a picture of the prompt of a row, with the row's group and further columns."""
    return JudgedPicture(place, image, file, path, row.prompt, row.group, dict(row.fields))


def _told(row: PromptRow, name: str) -> str:
    """Return the text of a number in the table; empty if there is none."""
    value = row.fields.get(name)
    return "" if value is None else str(value).strip()
