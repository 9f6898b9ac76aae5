"""Import of existing pictures: folders with a table, or folders in the layout of a published benchmark."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentreward.contracts import EditPrompt, sources_of
from latentreward.data.alignment.prompt_files import PromptRow, row_sources
from latentreward.data.images import ImageError, decode_image, file_image, image_bytes
from latentreward.data.list_rows import read_rows
from latentreward.data.readers.json_rows import as_object
from latentreward.errors import InputError, errors_at, first_line
from latentreward.scorers.tools import JudgedPicture
from latentreward.storage.digests import digest
from latentreward.storage.user_files import find_files, whole_file

TABLES = ("images.csv", "images.jsonl", "images.parquet")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
NUMBERED = re.compile(r"(.*)_(\d{6})")
"""File names of T2I-CompBench++: prompt and number."""


@dataclass(frozen=True)
class FoundPicture:
    """Picture in a folder, not yet matched with a set of prompts."""

    file: str  # path relative to the folder
    # raw prompt, an EditPrompt where the table names the pictures that were edited; None where the layout has no prompt
    prompt: str | None
    place: int | None = None  # number of the prompt from 0; within ``group`` where ``prompt`` is None. None if unknown.
    image: int | None = None  # number of the picture among those of its prompt, from 0; None if unknown
    group: str = ""  # group of the prompt; empty if the layout has no groups


@dataclass(frozen=True)
class ImportedPictures:
    """Pictures of a folder, matched with a set of prompts."""

    folder: Path
    # (index of the prompt, number of the picture of that prompt) → picture
    pictures: dict[tuple[int, int], JudgedPicture]
    # Number of pictures that are not wanted, because their prompt is not in the set or because the prompt has more
    # pictures than are wanted
    left_aside: int
    problems: dict[str, int]  # reason → number of pictures that could not be read, or that were made of other pictures


def find_pictures(folder: Path, table: Path | None) -> list[FoundPicture]:
    """List the pictures of a folder.

    Args:
        folder: Folder of one of two kinds. With a table ``images.csv``, ``images.jsonl`` or ``images.parquet``, as
            ``latentreward generate`` writes it: columns ``file`` and ``prompt``, optionally ``place``, ``image``,
            ``group`` and, of edits, ``source_images`` with paths in the folder. Or in the layout of GenEval
            (``00000/metadata.jsonl``, ``00000/samples/0000.png``), T2I-CompBench++
            (``CATEGORY/samples/PROMPT_000000.png``) or HPSv2 (``STYLE/00000.jpg``).
        table: File of the table, if it lies elsewhere or has another name.

    Raises:
        InputError: If there is no such folder or table, or neither a table nor a known layout is found.
    """
    if not folder.is_dir():
        raise InputError(f"images: no folder {folder}; give the folder of the pictures")
    path = table or next((folder / name for name in TABLES if (folder / name).is_file()), None)
    found = list(_of_table(path, folder) if path is not None else _of_layout(folder))
    if not found:
        raise InputError(
            f"images: {folder} holds no {TABLES[0]} and no pictures as GenEval, T2I-CompBench++ or HPSv2 lay them out; "
            f"write {TABLES[0]} there with columns file and prompt, or give such a table as table"
        )
    return found


def prompts_of(found: Sequence[FoundPicture], folder: Path) -> list[PromptRow]:
    """Return the distinct prompts of pictures, in order of first occurrence."""
    if any(picture.prompt is None for picture in found):
        raise InputError(f"images: {folder} does not hold the prompts of its pictures; set prompts")
    keys = dict.fromkeys((picture.group, picture.prompt) for picture in found if (picture.prompt or "").strip())
    if not keys:
        raise InputError(f"images: all prompts of {folder} are empty; set prompts")
    return [PromptRow(prompt or "", group) for group, prompt in keys]


def pictures_per_prompt(found: Iterable[FoundPicture], rows: Sequence[PromptRow]) -> int:
    """Return the largest number of pictures of one prompt: the highest number of a matched picture, plus 1."""
    return max((image for _, image in _match(found, rows)[0]), default=0) + 1


def import_pictures(
    folder: Path, found: Iterable[FoundPicture], rows: Sequence[PromptRow], wanted: Sequence[tuple[int, int]]
) -> ImportedPictures:
    """Match a folder's pictures with a set of prompts, and decode the wanted ones to find damaged files.

    Pictures are matched by the text of their prompt, and edits also by the bytes of the pictures that were edited.
    Pictures without a text are matched by group and by number of the prompt within the group. If a prompt occurs k
    times in the set, its pictures are cut into k runs of equal length, the first for the first occurrence. Where the
    table does not name the pictures that were edited, edits of unlike pictures with one text are matched by their place
    in the set. Damaged pictures are left out and counted in ``problems``. ``wanted`` pictures are told by their
    prompt's index in ``rows`` and their number among its pictures.
    """
    matched, left_aside, unlike = _match(found, rows)
    asked = set(wanted)
    left_aside += len(matched.keys() - asked)
    problems = Counter({"edits of other pictures than the prompt's": unlike} if unlike else {})
    pictures = {}
    for (place, image), file in sorted((name, file) for name, file in matched.items() if name in asked):
        try:
            decode_image(reference := file_image(folder, file))
        except ImageError as error:
            problems[error.problem] += 1
            continue
        pictures[place, image] = judged(place, image, file, reference.path or folder, rows[place])
    return ImportedPictures(folder, pictures, left_aside, dict(problems))


def judged(place: int, image: int, file: str, path: Path, row: PromptRow) -> JudgedPicture:
    """Return a picture of the prompt of a row, with the row's group and further columns."""
    return JudgedPicture(place, image, file, path, row.prompt, row.group, dict(row.fields))


def _match(found: Iterable[FoundPicture], rows: Sequence[PromptRow]) -> tuple[dict[tuple[int, int], str], int, int]:
    """Return (index of the prompt, number of the picture) → file, and how many pictures are of other prompts.

    The last result counts those of them that have the text of a prompt, but edit other pictures.
    """
    content_of = cache(_content)
    edited = [content_of(row.prompt) for row in rows]
    kept = defaultdict(list)
    for picture in found:
        key = picture.place if picture.prompt is None else str(picture.prompt)
        kept[picture.group, key, content_of(picture.prompt) if any(edited) else ()].append(picture)
    matched: dict[tuple[int, int], str] = {}
    aside = unlike = 0
    for (group, key, content), pictures in kept.items():
        of_text = _places(group, key, rows)
        places = [place for place in of_text if not content or edited[place] in ((), content)]
        if not places:
            aside += len(pictures)
            unlike += len(pictures) if of_text else 0
            continue
        if not content and len({edited[place] for place in places}) > 1:  # edits with one text and unlike pictures
            placed = [picture for picture in pictures if picture.place in places]
            aside += len(pictures) - len(placed)
            for picture in placed:
                matched.setdefault((picture.place, picture.image or 0), picture.file)  # type: ignore[arg-type]
            continue
        pictures.sort(key=lambda picture: (picture.place or 0, picture.image or 0))
        size = -(-len(pictures) // len(places))
        runs = (pictures[start : start + size] for start in range(0, len(pictures), size))
        for place, own in zip(places, runs, strict=False):
            numbers = [picture.image for picture in own]
            told = None not in numbers and len(set(numbers)) == len(numbers)
            for order, picture in enumerate(own):
                number = picture.image if told and picture.image is not None else order
                matched.setdefault((place, number), picture.file)
    return matched, aside, unlike


def _content(prompt: str | None) -> tuple[str, ...]:
    """Return hashes of the pictures that a prompt edits, none for a text alone."""
    return tuple(digest([image_bytes(image)]) for image in sources_of(prompt or ""))


def _places(group: str, key: str | int | None, rows: Sequence[PromptRow]) -> list[int]:
    """Return the indices in ``rows`` of a text, first within the group, or of prompt number ``key`` of the group."""
    if not isinstance(key, str):
        return [place for place, row in enumerate(rows) if row.group == group][key : (key or 0) + 1]
    places = [place for place, row in enumerate(rows) if str(row.prompt) == key]
    return [place for place in places if rows[place].group == group] or places


def _of_table(path: Path, folder: Path) -> Iterator[FoundPicture]:
    for number, row in enumerate(_read(path), start=1):
        file, prompt = row.get("file"), row.get("prompt")
        if not isinstance(file, str) or not file or not isinstance(prompt, str):
            raise InputError(f"table: row {number} of {path} has no file and prompt; write both columns")
        numbers: dict[str, int] = {}
        for name in ("place", "image"):
            if (value := row.get(name)) in (None, ""):
                continue
            if not re.fullmatch(r"\s*\d{1,15}(\.0)?\s*", str(value)):
                problem = f"{name} {value!r} in {path} is not a whole number"
                raise InputError(f"table: {problem}; write numbers from 0")
            numbers[name] = int(float(value))
        with errors_at(f"table: {path}: row {number}"):
            sources = row_sources(row, folder)
        text = EditPrompt(prompt, sources) if sources else prompt
        yield FoundPicture(file, text, group=str(row.get("group") or ""), **numbers)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix not in (".csv", ".jsonl", ".parquet") or not path.is_file():
        raise InputError(f"table: no CSV, JSON lines or parquet file {path}; give one with columns file and prompt")
    try:
        if path.suffix == ".parquet":
            yield from pq.read_table(whole_file(path)).to_pylist()
            return
        for number, value, problem in read_rows(path, "write JSON lines"):
            if isinstance(row := as_object(value, problem), str):
                raise InputError(f"line {number}: {row}")
            yield row
    except (ValueError, pa.ArrowException) as error:
        raise InputError(f"table: {path} cannot be read ({first_line(error)}); write it again") from error


def _of_layout(folder: Path) -> Iterator[FoundPicture]:
    for path in find_files(folder, "**/*"):
        parts = path.relative_to(folder).parts
        if path.suffix.lower() not in ENDINGS or not path.is_file():
            continue
        file = "/".join(parts)
        numbered = path.stem.isdecimal() and parts[0].isdecimal()
        metadata = folder / parts[0] / "metadata.jsonl"
        if len(parts) == 3 and parts[1] == "samples" and numbered and metadata.is_file():
            try:
                prompt = str(json.loads(metadata.read_text(encoding="utf-8"))["prompt"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"images: {metadata} names no prompt ({first_line(error)})") from error
            yield FoundPicture(file, prompt, int(parts[0]), int(path.stem))
        elif len(parts) > 1 and parts[-2] == "samples" and (match := NUMBERED.fullmatch(path.stem)):
            yield FoundPicture(file, match[1], int(match[2]), None, parts[0] if len(parts) == 3 else "")
        elif len(parts) == 2 and path.stem.isdecimal():
            yield FoundPicture(file, None, int(path.stem), 0, parts[0])
