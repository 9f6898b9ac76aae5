"""Reader of folders ``chosen/`` and ``rejected/`` with images of equal names, and a caption for each name."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, printable
from latentreward.core.storage.json_files import UTF_16, UnreadableTextError, read_text
from latentreward.core.storage.user_files import find_file, find_files, one_form, resolve_inside, whole_file
from latentreward.data.images import OUTSIDE, SUFFIXES
from latentreward.data.readers.json_rows import encodable, parse_line, parse_text, short
from latentreward.data.readers.rows import BadRow, Pair, PairRowParser, RowReader

logger = logging.getLogger(__name__)

SIDES, SOURCE = ("chosen", "rejected"), "source"
UNREAD = (
    ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".xcf", ".tga", ".exr", ".dng", ".cr2",
    ".cr3", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw", ".raw",
)  # fmt: skip
"""Suffixes of image files that are not decoded: they are counted, so that none is left out without a word."""
CAPTIONS = "captions"
CAPTIONS_FILE = "captions.jsonl"
Caption = tuple[str | None, str]
"""Text of a picture, None without one, and what is wrong with it, empty if nothing is."""
NO_TEXT: Caption = (None, "")


class FolderPairReader(RowReader):
    """Reader of pairs of image files, one row per name that occurs in both ``chosen/`` and ``rejected/``.

    A name is the path below ``chosen/`` or ``rejected/`` without suffix: ``chosen/cats/1.jpg`` and
    ``rejected/cats/1.png`` are the pair ``cats/1``. Files that are not images are ignored; images of ``UNREAD`` kinds
    are counted in a warning. The caption of ``cats/1`` comes from ``captions.jsonl``, with lines
    ``{"name": "cats/1", "prompt": "a cat"}``; without that file from ``captions/cats/1.txt``, else from
    ``chosen/cats/1.txt``, read whole without one line break at the end. If there is a folder ``source/``, the pair's
    images are edits of its picture ``source/cats/1.jpg``, and the caption is the instruction.

    A name is bad if it has no image or several in one of these folders, no caption, or unlike ones in
    ``captions.jsonl``; so is a line there without ``name`` and ``prompt``.

    Args:
        root: Folder with ``chosen/`` and ``rejected/``, or with one subfolder per split that holds both. Images outside
            it, behind links, are not opened, unless ``allow_outside`` is true.
        split: Name of the split's subfolder; null if ``root`` itself holds ``chosen/`` and ``rejected/``.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    def __init__(self, root: PathText, split: str | None = None, **options: Any) -> None:
        super().__init__("folder", split or "", **options)
        self.folder = Path(root, split) if split else Path(root)
        files, told, edits = {}, list[str](), (self.folder / SOURCE).is_dir()
        self.check_inside(root, self.folder, self.folder / CAPTIONS_FILE)
        for side in SIDES:
            if not (place := self.folder / side).is_dir():
                whole = split and Path(root, side).is_dir()
                fix = "set split: null, and data.val_share for data.val" if whole else "put images of pairs there"
                raise InputError(f"root: no folder {place}; {fix}")
        for side in (*SIDES, SOURCE) if edits and self.sources == "read" else SIDES:
            files[side], unread = find_pictures(self.folder / side)
            told += [f"{side}/: {remark}" for remark in unread]
        names = sorted({name for side in SIDES for name in files[side]})
        captions = self._read_captions() if (self.folder / CAPTIONS_FILE).is_file() else None
        parser = PairRowParser(self, partial(self._pair, files, captions, told), sources=None)
        rows = ((name, number, {"prompt": ""}) for number, name in enumerate(names))
        binary = pa.large_binary()  # names of files need not be UTF-8
        self.table = parser.table(rows, {"image_a": binary, "image_b": binary, "sources": pa.list_(binary)})
        if alone := sorted(set(captions or ()).difference(names)):
            told.append(f"{CAPTIONS_FILE}: no picture for {len(alone)} names, such as {short(alone[0])}")
        remedy = "give chosen/ and rejected/ images of equal names, with captions"
        self.report(str(self.folder), "; ".join([f"root: no pairs in {self.folder}", *told, remedy]))
        if told:
            logger.warning("%s: %s", printable(str(self.folder)), "; ".join(told))

    def _read_captions(self) -> dict[str, Caption]:
        captions: dict[str, Caption] = {}
        for line, text in read_lines(self.folder / CAPTIONS_FILE):
            row = parse_line(text)
            name, prompt = (row.get("name"), row.get("prompt")) if isinstance(row, dict) else (None, None)
            if isinstance(name, str) and (caption := parse_text(prompt)) is not None:
                note_caption(captions, one_form(name), caption, CAPTIONS_FILE)
            else:
                problem = 'the line is not an object with the texts "name" and "prompt"'
                self.refuse(f"{CAPTIONS_FILE}:{line}", problem, "caption line not readable")
        return captions

    def _pair(
        self,
        files: dict[str, dict[str, list[str]]],
        captions: dict[str, Caption] | None,
        told: Sequence[str],
        name: str,
        row: dict[str, Any],
    ) -> list[Pair]:
        """Return the pair of a name, which is ``SPLIT/NAME`` with a split."""
        found = {side: paths.get(name, []) for side, paths in files.items()}
        for side, paths in found.items():
            if len(paths) != 1:
                reason = f"{'several images' if paths else 'no image'} in {side}/"
                raise BadRow("; ".join([reason, *told]), reason)
        prompt, odd = (captions or {}).get(name, NO_TEXT)
        if odd:
            raise BadRow(odd, "several captions")
        try:
            texts = (self.folder / folder / f"{name}.txt" for folder in (CAPTIONS, SIDES[0]) if captions is None)
            prompt = next((text for file in texts if (text := read_caption(file, self.root)) is not None), prompt)
        except UnreadableTextError as error:
            raise BadRow(str(error), "caption not readable") from error
        if prompt is None:
            raise BadRow(f"no caption in {CAPTIONS_FILE}, {CAPTIONS}/{name}.txt or chosen/{name}.txt", "no caption")
        if len(prompt) > self.max_prompt_chars:
            raise BadRow(f"prompt has {len(prompt)} characters", "prompt too long")
        image_a, image_b, *sources = (os.fsencode(paths[0]) for paths in found.values())
        pair_id = encodable(f"{self.split}/{name}" if self.split else name)
        images = {"image_a": image_a, "image_b": image_b, "sources": sources}
        return [{"pair_id": pair_id, "prompt": prompt, "label": 1.0, **images}]


def note_caption(captions: dict[str, Caption], name: str, text: str, table: str) -> None:
    """Add the caption of a picture that a table names; a second one that differs is a problem of the picture."""
    first, _ = captions.setdefault(name, (text, ""))
    if first != text:
        captions[name] = first, f"{table} has {short(first)} and {short(text)} for it"


def read_caption(file: Path, root: Path | None = None) -> str | None:
    """Read a text file whole, without one line break at its end; return None if there is no such file.

    Raises:
        UnreadableTextError: If the file is not text, or lies outside ``root`` after links are followed.
    """
    if not (file := find_file(file)).is_file():
        return None
    if root is not None and resolve_inside(root, file) is None:
        raise UnreadableTextError(str(file), f"a {OUTSIDE}", f"put it into {root}, or set allow_outside: true")
    return read_text(file).removesuffix("\n").removesuffix("\r")


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of every line that is not blank, for :func:`parse_line`."""
    try:
        with whole_file(file).open("rb") as stream:
            if stream.read(2) in UTF_16:
                raise InputError(f"{file} is in UTF-16, and JSON lines are UTF-8; save it as UTF-8")
            stream.seek(0)
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; give a file of one JSON object per line") from error


def find_pictures(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Find the images below a folder: name → paths relative to its parent; and messages about what is not read."""
    found, unread = dict[str, list[str]](), list[str]()
    files = find_files(folder, "**/*", unread)
    for path in files:
        if path.suffix.lower() in SUFFIXES and not path.is_dir():
            name = one_form(path.relative_to(folder).with_suffix("").as_posix())
            found.setdefault(name, []).append(path.relative_to(folder.parent).as_posix())
    return found, [*unread, *tell_unread(files)]


def tell_unread(files: Iterable[Path]) -> list[str]:
    """Return a line with the number of files of each suffix in ``UNREAD``, and the remedy; empty without such files."""
    counts = Counter(suffix for file in files if (suffix := file.suffix.lower()) in UNREAD)
    named = " and ".join(f"{number} {suffix}" for suffix, number in counts.most_common())
    are = "file is" if counts.total() == 1 else "files are"
    told = f"{named} {are} left out: this kind of picture is not read; convert them to JPEG or PNG"
    return [told] if counts else []
