"""Images with prompts, from what people have: a folder, a pattern of names, or a list as JSON lines or CSV."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from latentreward.contracts import ImageRef
from latentreward.data.images import NO_IMAGE
from latentreward.data.list_rows import find_columns, read_rows
from latentreward.data.readers.base import MAX_PROMPT_CHARS
from latentreward.data.readers.folders import SUFFIXES
from latentreward.data.readers.json_rows import parse_text, short
from latentreward.errors import InputError

LISTS = (".jsonl", ".csv")
PICTURES = (*SUFFIXES, ".jfif", ".tif", ".tiff", ".avif", ".heic")
"""Endings of what counts as a picture in a folder; those that cannot be decoded are then said to be none."""
FOLDER_TABLES = ("metadata.jsonl", "metadata.csv", "captions.jsonl")
GENERATED = "generate.json"
"""Lies beside the table ``images.csv`` or ``images.jsonl`` of a folder that ``latentreward generate`` wrote."""

NO_PROMPT = "no prompt"
BAD_ROW = "unreadable row"
LONG_PROMPT = "prompt too long"


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image to look at, with its prompt.

    Attributes:
        name: What its source calls it: its path in the folder, or as the list has it; empty where the list has none.
        prompt: Raw text.
        path: The file; empty where there is none.
        root: Folder that ``path`` must stay in, links included; empty for none.
        problem: Why the row cannot be used, in words to count by; None if nothing is known against it.
        detail: Where and what the problem is.
    """

    name: str
    prompt: str = ""
    path: str = ""
    root: str = ""
    problem: str | None = None
    detail: str = ""

    def ref(self) -> ImageRef:
        """The image, not yet decoded."""
        return ImageRef(self.name, path=Path(self.path), root=Path(self.root) if self.root else None)


@dataclass(frozen=True)
class ImageList:
    """Images of one source, in its order.

    Attributes:
        source: As the user wrote it.
        rows: One per file or per line of a list; copies stay.
        remarks: What was found wrong beside the rows, such as lines about files that are not there.
    """

    source: str
    rows: tuple[ListedImage, ...]
    remarks: tuple[str, ...] = ()


def read_images(
    source: str,
    prompt: str | None = None,
    image_column: str | None = None,
    prompt_column: str | None = None,
    allow_outside: bool = False,
    max_prompt_chars: int = MAX_PROMPT_CHARS,
) -> ImageList:
    """What ``source`` names, of which no image is opened yet.

    - A folder: the pictures in it and below, sorted by path. The prompt of each is the text of ``NAME.txt`` beside
      ``NAME.png``, or comes from ``metadata.jsonl``, ``metadata.csv`` (Hugging Face's imagefolder) or
      ``captions.jsonl`` in a folder at or above the picture, of which the nearest wins. Of a folder that
      ``latentreward generate`` wrote, its table.
    - A pattern such as ``pics/**/*.png`` (``**``: any folders), or the name of a file: the same, for the pictures that
      match.
    - A list, ``.jsonl`` or ``.csv``: a row per image, whose path is relative to the list's folder.

    Args:
        source: See above.
        prompt: The prompt of all images, whatever the source says.
        image_column: Name of the column with paths; by default the first that there is of
            ``list_rows.IMAGE_COLUMNS``.
        prompt_column: Name of the column with prompts; by default the first that there is
            of ``list_rows.PROMPT_COLUMNS``.
        allow_outside: Whether a list may name files outside its folder.
        max_prompt_chars: Characters that a prompt may have; a row with more cannot be used.

    Raises:
        InputError: If there is nothing, a column is missing, or no image has a prompt.
    """
    found, rows = _read(source, prompt, (image_column, prompt_column), allow_outside), []
    for row in found.rows:
        if (size := len(row.prompt)) > max_prompt_chars:
            detail = f"{size} characters, more than max_prompt_chars={max_prompt_chars}: {short(row.prompt)}"
            row = replace(row, prompt="", problem=LONG_PROMPT, detail=detail)  # noqa: PLW2901
        rows.append(row)
    return replace(found, rows=tuple(rows))


def _read(source: str, prompt: str | None, columns: tuple[str | None, str | None], allow_outside: bool) -> ImageList:
    path = Path(source)
    if path.suffix.lower() in LISTS and not path.is_dir():
        return _read_list(source, path, prompt, columns, allow_outside)
    if path.is_dir() and (path / GENERATED).is_file():
        table = next((path / f"images{suffix}" for suffix in LISTS if (path / f"images{suffix}").is_file()), None)
        if table is not None:
            return _read_list(source, table, prompt, columns, allow_outside)
    root, files, remarks = _pictures(source)
    if prompt is not None:
        text = parse_text(prompt) or ""
        return ImageList(
            source, tuple(ListedImage(_name(file, root), text, str(file)) for file in files), tuple(remarks)
        )
    captions = _Captions(root, columns)
    rows = [_captioned(file, root, captions) for file in files]
    if all(row.problem for row in rows):
        raise InputError(
            f"images: none of {len(rows)} pictures in {root} has a prompt; put NAME.txt beside NAME.png, or "
            f"{' or '.join(FOLDER_TABLES)} with file_name and prompt in the folder, or give one for all with --prompt"
        )
    return ImageList(source, tuple(rows), (*remarks, *captions.unused()))


def _read_list(
    source: str, file: Path, prompt: str | None, columns: Sequence[str | None], allow_outside: bool
) -> ImageList:
    lines = read_rows(file)
    image, text = find_columns(file, lines, columns, with_prompts=prompt is None)
    root = "" if allow_outside else str(file.parent)
    rows = [_listed(file, line, row, image, text, prompt, root) for line, row in lines]
    return ImageList(source, tuple(rows))


def _listed(
    file: Path, line: int, row: Mapping[str, Any] | str, image: str, text: str, prompt: str | None, root: str
) -> ListedImage:
    """The image of one line."""
    place = f"line {line}"
    if isinstance(row, str):
        return ListedImage("", problem=BAD_ROW, detail=f"{place}: {row}")
    path = row.get(image)
    if not isinstance(path, str) or not path or "\0" in path:
        return ListedImage("", problem=NO_IMAGE, detail=f"{place}: {image} is {short(path)}, not a path")
    name = parse_text(path) or ""
    caption = parse_text(row.get(text) if prompt is None else prompt)
    if caption is None:
        detail = f"{place}: {text} is {short(row.get(text))}, not text"
        return ListedImage(name, "", str(file.parent / path), root, NO_PROMPT, detail)
    return ListedImage(name, caption, str(file.parent / path), root)


def _pictures(source: str) -> tuple[Path, list[Path], list[str]]:
    """The folder that names are relative to, the files, sorted, and folders that could not be read.

    Raises:
        InputError: If there are none.
    """
    place, remarks = Path(source), list[str]()
    if place.is_dir():
        files = [file for file in _walk(place, remarks) if _is_picture(file)]
        if not files:
            raise InputError(f"images: no picture in {source} ({', '.join(PICTURES)}); give a folder that holds some")
        return place, sorted(files), remarks
    if os.path.lexists(place):
        return place.parent, [place], []
    matches = map(Path, glob.glob(source, recursive=True))  # noqa: PTH207 - patterns may be absolute
    files = sorted(file for file in matches if _is_picture(file) and not file.is_dir())
    if not files:
        raise InputError(
            f"images: {source!r} is no folder, no file, and no pattern that a picture matches; give a folder, a "
            "pattern such as 'pics/**/*.png', or a list that ends in .jsonl or .csv"
        )
    return Path(*takewhile(lambda part: not glob.has_magic(part), place.parts[:-1])), files, []


def _walk(root: Path, remarks: list[str]) -> Iterator[Path]:
    """Every file at or below ``root``; links to folders are not followed."""

    def note(error: OSError) -> None:
        remarks.append(f"{error.filename}: {error.strerror}")

    for folder, _, names in os.walk(root, onerror=note):
        yield from (Path(folder, name) for name in names)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES and not file.name.startswith("._")  # macOS's side files


def _name(file: Path, root: Path) -> str:
    """``file`` below ``root``, as text that can be written."""
    return file.relative_to(root).as_posix().encode("utf-8", "replace").decode()


def _captioned(file: Path, root: Path, captions: "_Captions") -> ListedImage:
    """A picture with the prompt beside it."""
    prompt, name = _text_beside(file), _name(file, root)
    if prompt is None:
        prompt = captions.find(file)
    if prompt is None:
        detail = f"no {PurePosixPath(name).stem}.txt beside it, no line in {' or '.join(FOLDER_TABLES)}"
        return ListedImage(name, "", str(file), problem=NO_PROMPT, detail=detail)
    return ListedImage(name, prompt, str(file))


def _text_beside(file: Path) -> str | None:
    """Text of ``NAME.txt``, but for one line break at its end."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return None
    return text.read_bytes().decode("utf-8-sig", "replace").removesuffix("\n").removesuffix("\r")


class _Captions:
    """Tables of prompts in the folders of pictures, each read once.

    Args:
        root: Topmost folder to look in.
        columns: Names of the columns with paths and prompts, if not the usual ones.
    """

    def __init__(self, root: Path, columns: Sequence[str | None]) -> None:
        self.root, self.columns = root, columns
        self.remarks: list[str] = []
        self._tables: dict[Path, dict[str, str]] = {}
        self._used: set[tuple[Path, str]] = set()

    def find(self, picture: Path) -> str | None:
        """Prompt of a picture in the table nearest to it, by its path below that folder, with its ending or without."""
        for folder in picture.parents:
            if folder not in self._tables:
                self._tables[folder] = dict(self._read(folder))
            path = picture.relative_to(folder)
            for name in (path.as_posix(), path.with_suffix("").as_posix()):
                if name in self._tables[folder]:
                    self._used.add((folder, name))
                    return self._tables[folder][name]
            if folder == self.root:
                break
        return None

    def unused(self) -> list[str]:
        """What was wrong in the tables, pictures that are not there included."""
        names = [(folder, name) for folder, table in self._tables.items() for name in table]
        lost = [f"{folder}: no picture {short(name)}" for folder, name in names if (folder, name) not in self._used]
        return self.remarks + lost

    def _read(self, folder: Path) -> Iterator[tuple[str, str]]:
        """Paths, relative to ``folder``, with their prompts."""
        for file in (folder / name for name in FOLDER_TABLES if (folder / name).is_file()):
            lines = read_rows(file)
            image, text = find_columns(file, lines, self.columns)
            for line, row in lines:
                listed = _listed(file, line, row, image, text, None, "")
                if listed.problem:
                    self.remarks.append(f"{file}: {listed.detail}")
                else:
                    yield PurePosixPath(listed.name).as_posix(), listed.prompt
