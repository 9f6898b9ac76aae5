"""Base class of the readers of this package: a table with a row per pair, whose images are found row by row."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentreward.core.contracts import EditPrompt, ImageRef, PathText, PreferencePair
from latentreward.core.errors import InputError
from latentreward.core.running import coin_flips
from latentreward.core.storage.user_files import escapes, relative_path, resolve_inside
from latentreward.data.images import BASE64, NO_IMAGE, OUTSIDE, file_image, outside
from latentreward.data.readers.base import PairReader, content_key
from latentreward.data.readers.json_rows import short
from latentreward.data.readers.pair_rows import PairRowParser, Row

SCORED_AXES = ("overall", "instruction_following", "visual_quality")
SIDED = (*SCORED_AXES, "model", "votes")
FACTS = (*(f"{name}_{side}" for name in SIDED for side in "ab"), "confidence", "vote", "label_0", "tags")
"""Columns of a reader's table that :meth:`PairReader.facts` returns."""


class RowReader(PairReader):
    """Base of readers that keep a table with a row per pair; a subclass sets it and finds the images of a row.

    The table has the columns ``pair_id``, ``prompt`` (null for an empty one) and ``label``, the probability that the
    image that the file names first is preferred (null without label), further ones of ``pair_rows.INDEX`` and ``FACTS``
    as they are published, and what :meth:`find_images` needs.

    A row is bad, and falls under ``on_error``, if it is no object, its prompt is no text or too long, or a field is not
    as the format says. A path that is missing or leads out of its folder raises InputError in the constructor under
    ``on_error: raise``; otherwise the problem is found when the image is decoded, as is a missing file. Under ``skip``
    and ``placeholder``, a split is read without its missing files. Ties and copies are kept.

    Args:
        source: Name of the data set.
        split: Name of the split.
        randomise_sides: Exchange images a and b of each row whose file names the preferred image first with probability
            ½, by a random number that depends on ``seed`` and the row's ``pair_id``. Without it, a model that always
            prefers a would always be right.
        seed: Seed of the random exchange.
        allow_outside: Whether rows may name files outside their folder, and links in it may lead out of it.
        options: ``on_error``, ``max_prompt_chars``, ``exif`` and ``sources``, see :class:`PairReader`.
    """

    table: pa.Table
    winner_first = True  # whether files name the preferred image first, where no column of this name tells it
    folder: Any = None  # path of the folder of images that are files; None if there is none
    prefix = ""  # start of the names of these images
    images_in: tuple[Any, Sequence[str]] | None = None  # table and two columns of images in bytes, if there is one
    sources_in: tuple[Any, str] | None = None  # table and column of pictures to edit in bytes, if there is one

    def __init__(
        self,
        source: PathText,
        split: str,
        *,
        randomise_sides: bool = True,
        seed: int = 0,
        allow_outside: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.source, self.split, self.seed, self.allow_outside = source, split, seed, allow_outside
        self.randomise_sides = randomise_sides and self.winner_first

    def fill(
        self, rows: Iterable[Row], told: str, empty: str, parser: PairRowParser, more: Mapping[str, Any] | None = None
    ) -> None:
        """Parse all rows to the table, with ``more`` columns, and report what was left out."""
        self.table = parser.table(rows, more)
        self.report(told, empty)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to the two images of a row, in the order of the file; ``row`` is column → value.

        The columns ``image_a`` and ``image_b`` have their names in a table, or their paths inside :attr:`folder`.
        """
        names = [row["image_a"], row["image_b"]]
        if self.images_in is None:
            return [*map(self.file_image, names)]
        table, columns = self.images_in
        return self.embedded_images(table.read(row["row"], columns), names)

    def find_sources(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to the pictures that a row's images are edits of, by default files of :attr:`folder`."""
        if self.sources_in is None:
            return [*map(self.file_image, row.get("sources") or ())]
        table, column = self.sources_in
        return self.embedded_images(table.read(row["row"], [column])[0], row.get("sources"))

    def file_image(self, path: str | bytes | None) -> ImageRef:
        """Return a reference to a file of :attr:`folder`."""
        return file_image(self.folder, path, self.prefix, self.allow_outside)

    def embedded_images(self, value: Any, keys: Sequence[str | None] | None = None) -> list[ImageRef]:
        """Return references to the images of a row that has several, or one, see :func:`embedded_image`."""
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        names = keys if keys and len(keys) == len(values) else [None] * len(values)
        return [embedded_image(one, key, self.file_image) for one, key in zip(values, names, strict=True)]

    def missing_files(self, rows: Iterable[int]) -> list[tuple[int, str]]:
        if self.folder is None or self.images_in is not None:
            return []
        numbers, listed, missing = [*map(int, rows)], dict[str, set[str]](), list[tuple[int, str]]()
        for column in {"image_a", "image_b", "sources"}.intersection(self.table.column_names):
            values = self.table[column].take(pa.array(numbers, pa.int64())).to_pylist()
            for row, value in zip(numbers, values, strict=True):
                for path in map(os.fsdecode, filter(None, value if isinstance(value, list) else [value])):
                    place, _, name = path.rpartition("/")
                    if place not in listed:  # one listing of a folder costs less than looking for each of its files
                        listed[place] = _names(self.folder / place)
                    if name not in listed[place] and not self.file_image(path).path.exists():  # type: ignore[union-attr]
                        missing.append((row, path))
        return sorted(missing)

    @property
    def root(self) -> Any:
        """Folder that files must lie in; None if they may lie anywhere."""
        return None if self.allow_outside else self.folder

    def check_inside(self, root: PathText, *files: Path) -> None:
        """Raise InputError for a file or folder of data that a link leads out of ``root``, unless that is allowed."""
        for file in () if self.allow_outside else files:
            if resolve_inside(Path(root), file) is None:
                raise InputError(f"{file} {outside(Path(root))}")

    def check_path(self, pair_id: str, field: str, path: Any) -> None:
        """Raise InputError for what is no path, or leads out of the folder, if ``on_error`` is raise."""
        if self.on_error != "raise":
            return
        text = path if isinstance(path, str) else ""
        if not text or BASE64.fullmatch(text):
            told = "base64 text, not a path; write the image to a file" if text else "not a path"
            self.refuse(pair_id, f"{field} is {short(path)}, {told}", NO_IMAGE)
        elif not self.allow_outside and escapes(relative_path(text, self.folder)):
            self.refuse(pair_id, f"{field} {short(path)} {outside(self.folder)}", OUTSIDE)

    def read_row(self, index: int) -> dict[str, Any]:
        """Return the values of row ``index`` by column."""
        return {name: self.table[name][index].as_py() for name in self.table.column_names}

    def make_pair(self, row: dict[str, Any]) -> PreferencePair:
        """Return the pair of a row, with its images exchanged or not."""
        found = zip(self.find_images(row), (row.get("noise_a"), row.get("noise_b")), strict=True)
        image_a, image_b = (image if noise is None else replace(image, noise=noise) for image, noise in found)
        sources, prompt = self.find_sources(row), row["prompt"] or ""
        votes, weight = (row.get("votes_a"), row.get("votes_b")), row.get("weight")
        pair = PreferencePair(
            pair_id=row["pair_id"],
            prompt=EditPrompt(prompt, sources) if sources else prompt,
            image_a=image_a,
            image_b=image_b,
            label_a=row["label"],
            weight=1.0 if weight is None else weight,
            group_id=row.get("group_id"),
            votes=None if None in votes else votes,  # type: ignore[arg-type]
            confidence=row.get("confidence"),
            model_a=row.get("model_a"),
            model_b=row.get("model_b"),
            source=self.source,
            split=row.get("split") or self.split,
        )
        may_exchange = self.randomise_sides and row.get("winner_first", True)
        return pair.swapped() if may_exchange and coin_flips(self.seed, "side", 0, [pair.pair_id])[0] else pair

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> PreferencePair:
        return self.make_pair(self.read_row(index))

    def labels(self) -> np.ndarray:
        labels = self.table.column("label").to_numpy()
        return np.where(self.exchanged, 1.0 - labels, labels)

    def labelled(self) -> np.ndarray:
        return self.table.column("label").is_valid().to_numpy()

    def prompts(self) -> list[str]:
        """Return the raw prompt of every row; pictures in bytes that it edits are named without their bytes."""
        prompts, named = [prompt or "" for prompt in self.table.column("prompt").to_pylist()], self._named
        return [EditPrompt(prompt, named[row]) if named.get(row) else prompt for row, prompt in enumerate(prompts)]

    @cached_property
    def _named(self) -> dict[int, list[ImageRef]]:
        """References, without bytes, to the pictures that rows edit, by row; those in bytes without names are read."""
        known = "sources" in self.table.column_names
        keys = self.table["sources"].to_pylist() if known else [None] * len(self)
        if self.sources_in is None:
            return {row: self.find_sources({"sources": paths}) for row, paths in enumerate(keys) if paths}
        table, column = self.sources_in
        (alone := copy(table)).open_images([column])  # no other column is read
        named = {}
        for place, row in enumerate(self.table["row"].to_pylist()):
            read = () if keys[place] else self.embedded_images(alone.read(row)[0])
            named[place] = [*map(ImageRef, keys[place] or [image.image_key for image in read])]
        return named

    def pair_ids(self) -> list[str]:
        return self.table.column("pair_id").to_pylist()

    def groups(self) -> list[str]:
        return self.table.column("group").to_pylist() if "group" in self.table.column_names else super().groups()

    def facts(self) -> dict[str, list[Any]]:
        others = {f"{name}_{side}": f"{name}_{other}" for name in SIDED for side, other in ("ab", "ba")}
        columns = {name: self.table[name].combine_chunks() for name in FACTS if name in self.table.column_names}
        turned = pa.array(self.exchanged)
        facts = {name: pc.if_else(turned, columns[others.get(name, name)], column) for name, column in columns.items()}
        return {name: column.to_pylist() for name, column in facts.items()}

    @cached_property
    def exchanged(self) -> np.ndarray:
        """Whether the images of each row are exchanged, ``(len,)`` bool; a million rows take 4 s, once."""
        exchanged = np.full(len(self), self.randomise_sides)
        if "winner_first" in self.table.column_names:
            exchanged &= self.table.column("winner_first").fill_null(False).to_numpy()
        if exchanged.any():
            exchanged &= np.asarray(coin_flips(self.seed, "side", 0, self.pair_ids()), dtype=bool)
        return exchanged


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (OSError, ValueError):
        return set()


def embedded_image(value: Any, key: str | None = None, find: Callable[[str], ImageRef] = ImageRef) -> ImageRef:
    """Return a reference to an image: bytes, or a struct of ``bytes`` or ``path``; None if it is missing.

    Without a ``key``, a hash of its bytes names the image, or its path, with which ``find`` makes a reference.
    """
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and path:
        found = find(path)
        return replace(found, image_key=key or found.image_key)
    return ImageRef(key or content_key(data), data)
