"""Pictures that were made before or elsewhere: a folder with a table, or laid out as a benchmark has it."""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentreward.contracts import ImageRef
from latentreward.data.alignment.prompt_files import PromptRow
from latentreward.data.images import ImageError, decode_image, resolve_inside
from latentreward.errors import InputError, first_line
from latentreward.scorers.tools import JudgedPicture

TABLES = ("images.csv", "images.jsonl", "images.parquet")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
NUMBERED = re.compile(r"(.*)_(\d{6})")
"""T2I-CompBench++'s names: prompt and number."""


@dataclass(frozen=True)
class FoundPicture:
    """A picture in a folder, not yet matched with a set of prompts.

    Attributes:
        file: Name in the folder.
        prompt: Raw text, None where the layout does not tell it.
        place: Number of its prompt, in its group or in all, if known.
        image: Number of the picture of that prompt, if known.
        group: Kind of prompt, if the layout tells it.
    """

    file: str
    prompt: str | None
    place: int | None = None
    image: int | None = None
    group: str = ""


@dataclass(frozen=True)
class ImportedPictures:
    """A folder's pictures of a set of prompts.

    Attributes:
        pictures: By place and number.
        left_aside: Pictures that are not wanted: of other prompts, or further ones.
        problems: Reason → pictures that could not be read.
    """

    pictures: dict[tuple[int, int], JudgedPicture]
    left_aside: int
    problems: dict[str, int]


def find_pictures(folder: Path, table: Path | None) -> list[FoundPicture]:
    """What a folder holds.

    Args:
        folder: With ``images.csv``, ``images.jsonl`` or ``images.parquet``, as ``latentreward generate`` writes it:
            columns ``file`` and ``prompt``, and, if wanted, ``place`` and ``image``. Or laid out for GenEval
            (``00000/metadata.jsonl``, ``00000/samples/0000.png``), T2I-CompBench++
            (``CATEGORY/samples/PROMPT_000000.png``) or HPSv2 (``STYLE/00000.jpg``).
        table: The table, if it lies elsewhere or has another name.

    Raises:
        InputError: If there is no such folder or table, or neither a table nor a layout is recognised.
    """
    if not folder.is_dir():
        raise InputError(f"images: no folder {folder}; give the folder of the pictures")
    path = table or next((folder / name for name in TABLES if (folder / name).is_file()), None)
    found = list(_of_table(path) if path is not None else _of_layout(folder))
    if not found:
        raise InputError(
            f"images: {folder} holds no {TABLES[0]} and no pictures as GenEval, T2I-CompBench++ or HPSv2 lay them out; "
            f"write {TABLES[0]} there with columns file and prompt, or give such a table as table"
        )
    return found


def prompts_of(found: Sequence[FoundPicture], folder: Path) -> list[PromptRow]:
    """The distinct prompts of pictures, in their order.

    Raises:
        InputError: If the layout does not tell them.
    """
    if any(picture.prompt is None for picture in found):
        raise InputError(f"images: {folder} does not tell its prompts; set prompts")
    keys = dict.fromkeys((picture.group, picture.prompt) for picture in found if (picture.prompt or "").strip())
    if not keys:
        raise InputError(f"images: all prompts of {folder} are empty; set prompts")
    return [PromptRow(prompt or "", group) for group, prompt in keys]


def pictures_per_prompt(found: Iterable[FoundPicture], rows: Sequence[PromptRow]) -> int:
    """Most pictures of one prompt."""
    return max((image for _, image in _match(found, rows)[0]), default=0) + 1


def import_pictures(
    folder: Path, found: Iterable[FoundPicture], rows: Sequence[PromptRow], wanted: Sequence[tuple[int, int]]
) -> ImportedPictures:
    """Match a folder's pictures with prompts, by their text or, where that is not told, by group and number.

    Pictures of a prompt that occurs several times in the set go to its places in turn. Those that are wanted are read,
    so that a damaged one shows now.
    """
    matched, left_aside = _match(found, rows)
    asked = set(wanted)
    left_aside += len(matched.keys() - asked)
    problems: Counter[str] = Counter()
    pictures = {}
    for (place, image), file in sorted((name, file) for name, file in matched.items() if name in asked):
        row, path = rows[place], resolve_inside(folder, folder / file)
        try:
            decode_image(ImageRef(file, path=path or folder / file, root=folder))
        except ImageError as error:
            problems[error.problem] += 1
            continue
        pictures[place, image] = JudgedPicture(
            place, image, file, folder / file, row.prompt, row.group, dict(row.fields)
        )
    return ImportedPictures(pictures, left_aside, dict(problems))


def _match(found: Iterable[FoundPicture], rows: Sequence[PromptRow]) -> tuple[dict[tuple[int, int], str], int]:
    """Files by place and number, and the number of pictures that are of none of the prompts."""
    kept = defaultdict(list)
    for picture in found:
        kept[picture.group, picture.place if picture.prompt is None else picture.prompt].append(picture)
    matched: dict[tuple[int, int], str] = {}
    aside = 0
    for (group, key), pictures in kept.items():
        places = _places(group, key, rows)
        aside += 0 if places else len(pictures)
        for place, own in zip(places, _shares(pictures, len(places)), strict=False):
            numbers = [picture.image for picture in own]
            told = None not in numbers and len(set(numbers)) == len(numbers)
            for order, picture in enumerate(own):
                number = picture.image if told and picture.image is not None else order
                matched.setdefault((place, number), picture.file)
    return matched, aside


def _places(group: str, key: str | int | None, rows: Sequence[PromptRow]) -> list[int]:
    """Places of a prompt's text, or of its number in a group; of the group alone, if the text is in it."""
    if not isinstance(key, str):
        return [place for place, row in enumerate(rows) if row.group == group][key : (key or 0) + 1]
    places = [place for place, row in enumerate(rows) if row.prompt == key]
    return [place for place in places if rows[place].group == group] or places


def _shares(pictures: list[FoundPicture], number: int) -> list[list[FoundPicture]]:
    """Pictures of one text, by place and number, dealt out to as many places."""
    pictures = sorted(pictures, key=lambda picture: (picture.place or 0, picture.image or 0))
    size = -(-len(pictures) // max(number, 1))
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]


def _of_table(path: Path) -> Iterator[FoundPicture]:
    for number, row in enumerate(_read(path), start=1):
        file, prompt = row.get("file"), row.get("prompt")
        if not isinstance(file, str) or not file or not isinstance(prompt, str):
            raise InputError(f"table: row {number} of {path} has no file and prompt; write both columns")
        yield FoundPicture(file, prompt, _whole(row, "place", path), _whole(row, "image", path), row.get("group") or "")


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in (".csv", ".jsonl", ".parquet") or not path.is_file():
        raise InputError(f"table: no CSV, JSON lines or parquet file {path}; give one with columns file and prompt")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    except (ValueError, TypeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"table: {path} cannot be read ({first_line(error)}); write it again") from error


def _whole(row: dict[str, Any], column: str, path: Path) -> int | None:
    value = row.get(column)
    if value in (None, ""):
        return None
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InputError(f"table: {column} {value!r} in {path} is no whole number; write numbers from 0") from error


def _of_layout(folder: Path) -> Iterator[FoundPicture]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.suffix.lower() not in ENDINGS or not path.is_file():
            continue
        file = "/".join(parts)
        numbered = path.stem.isdigit() and parts[0].isdigit()
        if len(parts) == 3 and parts[1] == "samples" and numbered and (path.parents[1] / "metadata.jsonl").is_file():
            yield FoundPicture(file, _geneval_prompt(path.parents[1]), int(parts[0]), int(path.stem))
        elif len(parts) > 1 and parts[-2] == "samples" and (match := NUMBERED.fullmatch(path.stem)):
            yield FoundPicture(file, match[1], int(match[2]), None, parts[0] if len(parts) == 3 else "")
        elif len(parts) == 2 and path.stem.isdigit():
            yield FoundPicture(file, None, int(path.stem), 0, parts[0])


def _geneval_prompt(folder: Path) -> str:
    try:
        return str(json.loads((folder / "metadata.jsonl").read_text(encoding="utf-8"))["prompt"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"images: {folder}/metadata.jsonl names no prompt ({first_line(error)})") from error
