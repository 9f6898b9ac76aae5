"""Plain folders: ``chosen/`` and ``rejected/`` with images of equal names, and a caption for each name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.contracts import PreferencePair
from latentreward.data.readers.groups import file_image
from latentreward.data.readers.json_rows import JSONReader, parse_json, parse_text
from latentreward.errors import InputError

SIDES = ("chosen", "rejected")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAPTIONS = "captions"
CAPTIONS_FILE = "captions.jsonl"


class FolderPairReader(JSONReader):
    """Pairs of image files, one row per name that ``chosen/`` and ``rejected/`` have in common.

    A name is the path below ``chosen/`` or ``rejected/`` without its ending, so ``chosen/cats/1.jpg`` and
    ``rejected/cats/1.png`` are the pair ``cats/1``; other files are left aside. Its caption is looked for in

    1. ``captions.jsonl``, lines ``{"name": "cats/1", "prompt": "a cat"}``, if there is such a file;
    2. ``captions/cats/1.txt``;
    3. ``chosen/cats/1.txt``.

    A text file is taken whole, but for one line break at its end. A name with one image, several images on one side,
    no caption or one that is too long falls under ``on_error``, as does a line of ``captions.jsonl``
    that is no such object.

    Args:
        root: Folder with ``chosen/`` and ``rejected/``, or with a folder per split that has them; no image outside it
            is opened.
        split: Name of the split's folder; null if ``root`` has the pairs itself.
        options: See :class:`~latentreward.data.readers.base.SideExchangingReader`.

    Raises:
        InputError: If a folder is missing, no row is left, or one breaks a rule above.
    """

    def __init__(self, root: str, split: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.split = split or ""
        self._folder = Path(root, split) if split else Path(root)
        for side in SIDES:
            if not (self._folder / side).is_dir():
                raise InputError(f"root: no folder {self._folder / side}; pairs lie in chosen/ and rejected/")
        files = {side: _find_images(self._folder / side) for side in SIDES}
        captions = self._read_captions_file() if (self._folder / CAPTIONS_FILE).is_file() else None
        rows = [
            self._check(name, files, captions) for name in sorted({name for side in files.values() for name in side})
        ]
        self._rows = [row for row in rows if row is not None]
        if not self._rows:
            raise InputError(f"root: no pairs in {self._folder}; give chosen/ and rejected/ images of equal names")
        self.report(str(self._folder))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PreferencePair:
        name, prompt, chosen, rejected, sound = self._rows[index]
        pair = PreferencePair(
            pair_id=self._pair_id(name),
            prompt=prompt,
            image_a=file_image(self._folder, chosen),
            image_b=file_image(self._folder, rejected),
            label_a=1.0 if sound else None,
            source="folder",
            split=self.split,
        )
        return pair.swapped() if self.is_exchanged(pair.pair_id) else pair

    def labels(self) -> np.ndarray:
        """``(len,)`` float: 1 where the chosen image is a, 0 where it is b, NaN for placeholders."""
        sound = [row[4] for row in self._rows]
        return np.where(sound, 1.0 - np.array(self.exchanged(), dtype=np.float64), np.nan)

    def prompts(self) -> list[str]:
        """Caption of every row."""
        return [row[1] for row in self._rows]

    def pair_ids(self) -> list[str]:
        """Split and name of every row."""
        return [self._pair_id(row[0]) for row in self._rows]

    def _pair_id(self, name: str) -> str:
        return f"{self.split}/{name}" if self.split else name

    def _read_captions_file(self) -> dict[str, str]:
        captions: dict[str, str] = {}
        for line, text in read_lines(self._folder / CAPTIONS_FILE):
            row = parse_json(text, None)
            name, prompt = (row.get("name"), parse_text(row.get("prompt"))) if isinstance(row, dict) else (None, None)
            if isinstance(name, str) and prompt is not None:
                captions[name] = prompt
            else:
                problem = 'the line is no object with the texts "name" and "prompt"'
                self.refuse(f"{CAPTIONS_FILE}:{line}", problem, "caption line not readable")
        return captions

    def _check(
        self, name: str, files: dict[str, dict[str, list[str]]], captions: dict[str, str] | None
    ) -> tuple[str, str, str, str, bool] | None:
        """Name, caption, two paths and whether all is there; None leaves the row out."""
        sound, paths = True, []
        for side in SIDES:
            found = files[side].get(name, [])
            paths.append(found[0] if found else "")
            if sound and len(found) != 1:
                sound = False
                what = "several images" if found else "no image"
                self.refuse(name, f"{what} of this name in {side}/", f"{what} in {side}/")
        prompt = self._find_caption(name) if captions is None else captions.get(name)
        if sound and prompt is None:
            sound = False
            self.refuse(
                name, f"no caption in {CAPTIONS_FILE}, {CAPTIONS}/{name}.txt or chosen/{name}.txt", "no caption"
            )
        if sound and prompt is not None and len(prompt) > self.max_prompt_chars:
            self.refuse_long_prompt(name, len(prompt))
            sound, prompt = False, None
        if not sound and self.on_error == "skip":
            return None
        return name, prompt or "", paths[0], paths[1], sound

    def _find_caption(self, name: str) -> str | None:
        for folder in (CAPTIONS, SIDES[0]):
            file = self._folder / folder / f"{name}.txt"
            if file.is_file():
                return file.read_bytes().decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
        return None


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1 on, and text of every line that is not blank.

    Raises:
        InputError: If there is no such file.
    """
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; give a file of one JSON object per line") from error


def _find_images(folder: Path) -> dict[str, list[str]]:
    """Paths below the folder's parent by name."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.is_dir():
            name = path.relative_to(folder).with_suffix("").as_posix()
            found.setdefault(name, []).append(path.relative_to(folder.parent).as_posix())
    return found
