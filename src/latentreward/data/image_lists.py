"""Reading of images with prompts from a folder, a glob pattern, or a list in JSON, CSV or TSV."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentreward.core.contracts import EditPrompt, ImageRef
from latentreward.core.errors import InputError, did_you_mean, errors_at
from latentreward.core.storage.json_files import UnreadableTextError, read_table, read_text
from latentreward.core.storage.user_files import escapes, find_file, find_files, one_form, resolve_inside, split_pattern
from latentreward.data.images import NO_IMAGE, OUTSIDE, SUFFIXES, file_image, outside
from latentreward.data.readers.base import MAX_PROMPT_CHARS
from latentreward.data.readers.folders import (
    NO_TEXT,
    UNREAD,
    Caption,
    note_caption,
    read_caption,
    read_lines,
    tell_unread,
)
from latentreward.data.readers.json_rows import (
    EDIT_UNREAD,
    MOST_SOURCES,
    SOURCES,
    as_object,
    find_edit_source,
    list_sources,
    parse_rows,
    parse_text,
    parse_value,
    short,
)

IMAGE_COLUMNS = ("file_name", "file", "path", "image", "name")
"""Usual names of the column with paths, in order of preference.

``image`` comes after ``file``, because ``image`` is a number in the table of ``latentreward generate``.
"""
PROMPT_COLUMNS = ("prompt", "caption", "text")

Line = tuple[int, dict[str, Any] | str]
"""Number of a line (of a JSON list's item, from 1), with its row as a dict or what is wrong with the line."""


def read_rows(file: Path, remedy: str, as_list: Callable[[Any], Any] | None = None) -> Iterator[tuple[int, Any, str]]:
    """Yield the rows of a ``.json``, ``.csv`` or ``.tsv`` file, or JSON lines; of JSON, a list that ``as_list`` makes.

    A row is the number of its line, or of the list's item from 1; its value; and what is wrong with it, if anything is.
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
    """Read every line of a list of images that is not blank, as its number with its row or what is wrong with it."""
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
    """Choose the columns with paths and, if wanted, with prompts: those ``asked`` for, else the first usual name."""
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
        told = f"images: {file} has no column {', '.join(usual[:-1])} or {usual[-1]} (it has: {short(there)})"
        raise InputError(f"{told}; name it with --{setting}{prompt}")
    return found


LISTS = (".jsonl", ".csv", ".tsv", ".json")
PICTURES = (*SUFFIXES, *UNREAD)
"""Suffixes of image files to look for in a folder; files that cannot be decoded are reported as such later."""
FOLDER_TABLES = ("metadata.jsonl", "metadata.csv", "captions.jsonl")

NO_PROMPT = "no prompt"
BAD_CAPTION = "unreadable caption"


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image with its prompt, as a folder or a list gives it; not opened yet."""

    name: str  # path of the image below the folder, or as written in the list; empty if the list's row has no path
    prompt: str = ""  # raw text; an EditPrompt if the image is an edit of pictures
    path: str = ""  # path of the image file; empty if the row has none
    root: str = ""  # folder that ``path`` must lie in after links are followed; empty for no such limit
    problem: str | None = None  # reason why the row cannot be used, without values; None if no problem is known
    detail: str = ""  # the problem with its line number and value

    def ref(self) -> ImageRef:
        """Return a reference to the image file, for decoding."""
        return ImageRef(self.name, path=Path(self.path), root=Path(self.root) if self.root else None)


@dataclass(frozen=True)
class ImageList:
    """Images of one source, in the source's order."""

    source: str  # folder, pattern or list, as the user wrote it
    rows: tuple[ListedImage, ...]  # one entry per image file or per line of a list; duplicates are kept
    remarks: tuple[str, ...] = ()  # problems that belong to no row, e.g. a table's line about a missing picture


def read_images(
    source: str,
    prompt: str | None = None,
    image_column: str | None = None,
    prompt_column: str | None = None,
    allow_outside: bool = False,
    max_prompt_chars: int = MAX_PROMPT_CHARS,
) -> ImageList:
    """List images with their prompts from a folder, a pattern, a file or a list; no image is opened.

    - Folder: the pictures in the folder and its subfolders, sorted by path. A picture ``NAME.png`` gets its prompt
      from ``NAME.txt`` beside it; without such a file, from a table in the folder: ``metadata.jsonl``,
      ``metadata.csv`` (Hugging Face's imagefolder) or ``captions.jsonl``. A folder written by ``latentreward generate``
      is read by its table ``images.csv`` or ``images.jsonl``.
    - Pattern such as ``pics/**/*.png`` (``**`` matches any subfolders), or one image file: the matching pictures, with
      prompts found as for a folder.
    - List, ``.jsonl``, ``.csv``, ``.tsv`` or a ``.json`` list of objects: one row per image; paths are relative to the
      list's folder. A column ``source_images`` or ``source_image`` has the pictures that the image is an edit of: one
      path, or a list of paths (in a table as JSON), which the row's prompt carries.

    ``prompt`` replaces the prompts of the source. The columns with paths and prompts are by default the first of
    ``IMAGE_COLUMNS`` and ``PROMPT_COLUMNS``. With ``allow_outside``, a list may name files outside its folder. A row
    with a prompt longer than ``max_prompt_chars`` gets a ``problem``.
    """
    found, rows = _read(source, prompt, (image_column, prompt_column), allow_outside), []
    for row in found.rows:
        if (size := len(row.prompt)) > max_prompt_chars:
            detail = f"{size} characters, more than max_prompt_chars={max_prompt_chars}: {short(row.prompt)}"
            row = replace(row, prompt="", problem="prompt too long", detail=detail)  # noqa: PLW2901
        rows.append(row)
    return replace(found, rows=tuple(rows))


def _read(source: str, prompt: str | None, columns: tuple[str | None, str | None], allow_outside: bool) -> ImageList:
    path = Path(source)
    if (path / "generate.json").is_file():
        path = next((table for suffix in LISTS if (table := path / f"images{suffix}").is_file()), path)
    if path.suffix.lower() in LISTS and not path.is_dir():
        lines, limit = read_objects(path), "" if allow_outside else str(path.parent)
        image, text = find_columns(path, lines, columns, with_prompts=prompt is None)
        return ImageList(source, tuple(_listed(path, line, row, image, text, prompt, limit) for line, row in lines))
    if path.suffix.lower() in (".parquet", ".arrow") and path.is_file():
        raise InputError(f"images: {source} is a table, not a list or a picture; write it as {' or '.join(LISTS[:2])}")
    root, files, remarks = _pictures(source)
    if (given := parse_text(prompt)) is not None:
        return ImageList(source, tuple(ListedImage(_name(file, root), given, str(file)) for file in files), (*remarks,))
    rows, (captions, told) = list[ListedImage](), _read_tables(root, columns)
    for file in files:
        try:
            found: Caption = read_caption(file.with_suffix(".txt")), ""
        except UnreadableTextError as error:
            found = None, f"{parse_text(file.stem)}.txt beside it is {error.problem}"
        named = captions.get(one_form(str(file)), captions.get(one_form(str(file.with_suffix(""))), NO_TEXT))
        caption, detail = named if found == NO_TEXT else found
        problem = BAD_CAPTION if detail else NO_PROMPT if caption is None else None
        if problem == NO_PROMPT:
            detail = f"no {parse_text(file.stem)}.txt beside it, no line in {' or '.join(FOLDER_TABLES)}"
        rows.append(ListedImage(_name(file, root), caption or "", str(file), "", problem, detail))
    if all(row.problem for row in rows):
        odd = next((f" ({row.name}: {row.detail})" for row in rows if row.problem == BAD_CAPTION), "")
        told = f"images: none of {len(rows)} pictures in {root} has a prompt{odd}; put NAME.txt beside NAME.png"
        tables = f"{' or '.join(FOLDER_TABLES)} with file_name and prompt in the folder"
        raise InputError(f"{told}, or {tables}, or give one for all with --prompt")
    return ImageList(source, tuple(rows), (*remarks, *told))


def _listed(
    file: Path, line: int, row: Mapping[str, Any] | str, image: str, text: str, prompt: str | None, root: str
) -> ListedImage:
    """Return a list's row; its prompt carries the pictures that the row is an edit of."""
    place = f"line {line}"
    if isinstance(row, str):
        return ListedImage("", problem="unreadable row", detail=f"{place}: {row}")
    path = row.get(image)
    if not isinstance(path, str) or not path or "\0" in path:
        return ListedImage("", problem=NO_IMAGE, detail=f"{place}: {image} is {short(path)}, not a path")
    caption = parse_text(row.get(text) if prompt is None else prompt)
    found = file_image(file.parent, path).path or file
    listed = ListedImage(parse_text(path) or "", caption or "", str(found), root)
    name, values = list_sources(row)
    paths = [parse_text(value) or "" for value in values]
    if caption is None:
        problem, detail = NO_PROMPT, f"{place}: {text} is {short(row.get(text))}, not text"
    elif root and escapes(path) and resolve_inside(Path(root), found) is None:
        problem, detail = OUTSIDE, f"{place}: {outside(Path(root))}"
    elif (unread := find_edit_source(row, [*SOURCES, image])) is not None:
        detail = f"{short(unread)} is a picture to edit, and {SOURCES[0]} is read; rename it, or leave the column out"
        problem = EDIT_UNREAD
    elif len(paths) > MOST_SOURCES or not all(paths):
        problem = "pictures to edit not readable"
        detail = f"{name} is {short(row[name])}, not at most {MOST_SOURCES} paths"
    else:
        refs = [file_image(file.parent, path, allow_outside=not root) for path in paths]
        return replace(listed, prompt=EditPrompt(caption, refs)) if refs else listed
    return replace(listed, problem=problem, detail=detail)


def _pictures(source: str) -> tuple[Path, list[Path], list[str]]:
    """Find the pictures of a folder, pattern or file: the folder of their names, sorted files, and what is not read."""
    place, remarks = find_file(Path(source)), list[str]()
    if not place.is_dir() and os.path.lexists(place) and place.suffix.lower() in ("", *PICTURES):
        return place.parent, [place], []
    root, pattern = (place, "**/*") if place.is_dir() else split_pattern(source)
    found = (file for file in find_files(root, pattern, remarks) if file.suffix.lower() in PICTURES)
    files = [file for file in found if not file.is_dir()]
    if place.is_dir() and not any(file.suffix.lower() in SUFFIXES for file in files):
        problem = "; ".join([f"images: no picture in {source} ({', '.join(SUFFIXES)})", *tell_unread(files)])
        raise InputError(f"{problem}; give a folder that holds some")
    if not files:
        told = f"images: {source!r} is neither a folder, a file, nor a pattern that matches a picture; give a folder"
        raise InputError(f"{told}, a pattern such as 'pics/**/*.png', or a list that ends in {', '.join(LISTS)}")
    return root, files, remarks


def _name(file: Path, root: Path) -> str:
    """Return the path of ``file`` relative to ``root``, with characters replaced that UTF-8 cannot encode."""
    return file.relative_to(root).as_posix().encode("utf-8", "replace").decode()


def _read_tables(root: Path, columns: Sequence[str | None]) -> tuple[dict[str, Caption], Iterable[str]]:
    """Read the tables in a folder of pictures.

    Returns path, perhaps without suffix, of a picture → its prompt in the last table that has one; and messages.
    """
    captions, remarks = dict[str, Caption](), dict[str, None]()
    for table in (root / name for name in FOLDER_TABLES if (root / name).is_file()):
        lines, found = read_objects(table), dict[str, Caption]()
        image, text = find_columns(table, lines, columns)
        for line, row in lines:
            listed = _listed(table, line, row, image, text, None, str(root))
            if listed.problem:
                remarks[f"{table}: {listed.detail}"] = None
            else:
                note_caption(found, one_form(listed.path), listed.prompt, table.name)
        captions |= found
    return captions, remarks
