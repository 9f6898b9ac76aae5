"""Readers of ImageReward's ranked test set, as published with its code, and of ImageRewardDB, as zip files."""

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError
from latentreward.core.storage.hub import is_hub_id
from latentreward.core.storage.user_files import find_files, whole_file
from latentreward.data.images import NO_IMAGE
from latentreward.data.readers.archives import ImageArchives
from latentreward.data.readers.groups import UNRANKED, ImageGroup, check_ranks, pair_images, parse_ranked
from latentreward.data.readers.hub import fetch_files
from latentreward.data.readers.json_rows import check_row, load_rows, parse_rows, parse_text, short
from latentreward.data.readers.parquet_store import ParquetPart, damage_named
from latentreward.data.readers.rows import RowReader

PARTS = {"train": 32, "validation": 2, "test": 2}
"""Number of zip files of each published split."""
COLUMNS = ("image_path", "prompt_id", "prompt", "rank")


class ImageRewardReader(RowReader):
    """Reader of pairs from ImageReward's test set, with 4 to 9 ranked images for each prompt.

    A row of the file gives all pairs of its images, with the row's ``id`` as ``group_id``. Equal ranks are a tie (½)
    and are kept. Pairs of a row with a null or missing ranking are unlabelled. A null or missing prompt is read as an
    empty prompt. A row falls under ``on_error`` as a whole if it is not an object, its prompt is not text or too long,
    its ``generations`` are not a list, or its ``ranking`` is not one number for each of them.

    Args:
        root: Folder that holds ``test.json`` and ``test_images/``, directly or in ``data/`` as in the repository;
            images outside ``test_images/`` are not opened.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.

    Raises:
        InputError: If the file is missing, is not a JSON list, has no pairs left, or breaks a rule above under
            ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(self, root: PathText, **options: Any) -> None:
        super().__init__("imagereward", "test", **options)
        inner = Path(root, "data")
        file = (inner if (inner / "test.json").is_file() else Path(root)) / "test.json"
        self.folder = file.parent / "test_images"
        self.check_inside(root, file, self.folder)
        self.table = pair_images(self._parse(load_rows(file)))
        self.report(str(file), f"root: {file} has no pairs left; give the published file")

    def _parse(self, rows: list[Any]) -> Iterator[ImageGroup]:
        for number, row in enumerate(rows):
            group = parse_ranked(self, f"test.json:{number}", row, ("generations", "ranking"))
            if group is not None:
                named = row.get("id") if isinstance(row, dict) else None
                yield group if named is None else replace(group, group_id=parse_text(str(named)))


class ImageRewardDBReader(RowReader):
    """Reader of one split of ImageRewardDB: all pairs of a prompt's images, compared by their ``rank``.

    Rows come from ``metadata-{split}.parquet``; without this file, from the JSON file in each zip file ("part"). The
    ``group_id`` is the ``prompt_id``. Images are read from the zip files when a row is accessed. A part that is
    unpacked beside its zip file is read from the folder.

    Equal ranks are a tie (½) and are kept. Pairs of a prompt whose ranks are all null are unlabelled. A null or missing
    prompt is read as an empty prompt. A path that is missing, or that its part does not hold, counts as an unreadable
    image. A row falls under ``on_error`` if it is not an object or has no ``prompt_id``. All images of a prompt fall
    under ``on_error`` together if the prompt is not text or too long, or some of its ranks are not numbers.

    Args:
        source: Folder with ``images/{split}/{split}_{i}.zip``; otherwise the id of a hub data set with those files.
        split: ``train``, ``validation`` or ``test``.
        parts: Numbers of the parts to read, e.g. ``[1, 2]`` of train's 1 to 32 for a smaller training set. By default
            all parts are read, and parts that the metadata name but the folder lacks fall under ``on_error``.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.

    Raises:
        InputError: If the split or a part cannot be found or opened, no pairs are left, or a rule above is broken under
            ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(
        self,
        source: PathText,
        split: str,
        *,
        parts: Sequence[int] | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__("imagerewarddb", split, **options)
        places, metadata = _find_places(source, split, parts, revision), Path(source, f"metadata-{split}.parquet")
        if Path(source).is_dir():
            self.check_inside(source, metadata, *places, *(place / f"{place.name}.json" for place in places))
        self._archives = ImageArchives(places, self.allow_outside)
        rows_of_parts = (
            (f"{part}.json:{number}", part, row)
            for part in self._archives.parts
            for number, row in enumerate(parse_rows(*self._archives.read_rows(part)))
        )
        rows = self._read_metadata(metadata, parts) if metadata.is_file() else rows_of_parts
        self.table = pair_images(self._parse(rows))
        self.report(f"{source} {split}", f"split: {split!r} of {source} has no pairs left; check the files and parts")

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to two images, with their bytes from a zip file or their paths in an unpacked folder."""
        places = [(row[name] or "").partition("/") for name in ("image_a", "image_b")]
        return [self._archives.image(part, file) if part else ImageRef("") for part, _, file in places]

    def _read_metadata(self, file: Path, parts: Sequence[int] | None) -> Iterator[tuple[str, str | None, Any]]:
        """Yield (name for messages, part, row) of every row of the metadata that belongs to the parts to read."""
        with damage_named(ParquetPart(file.name, file)):
            table = pq.read_table(whole_file(file), page_checksum_verification=True)
        if missing := [name for name in COLUMNS if name not in table.column_names]:
            raise InputError(f"{file}: no column {', '.join(missing)}; remove it to read the JSON files of the parts")
        rows = table.select(list(COLUMNS)).to_pylist()
        # The part of a path is e.g. train_7 of images/train/train_7/x.webp.
        paths = (row["image_path"] if isinstance(row["image_path"], str) else "" for row in rows)
        found = (re.fullmatch(rf"{re.escape(self.split)}_\d+", PurePosixPath(path).parent.name) for path in paths)
        named = [match and match[0] for match in found]
        absent = {part for part in named if part is not None and part not in self._archives.parts}
        if absent and parts is None:
            first = ", ".join(sorted(absent)[:3])
            problem = f"{self.split} lacks {len(absent)} of its parts ({first}); download them, or set parts"
            self.refuse(str(file), problem, "part missing", len(absent))
        for number, (part, row) in enumerate(zip(named, rows, strict=True)):
            if part not in absent:
                yield f"{file.name}:{number}", part, row

    def _parse(self, rows: Iterable[tuple[str, str | None, Any]]) -> Iterator[ImageGroup]:
        groups: dict[str, list[tuple[dict[str, Any], str | None]]] = {}
        refused: set[str] = set()
        for name, part, content in rows:
            row, sound = check_row(self, name, content)
            prompt_id = None if row.get("prompt_id") is None else parse_text(str(row["prompt_id"]))
            if sound and prompt_id is None:
                self.refuse(name, "prompt_id is null or missing", "row without prompt_id")
            if prompt_id is None:
                continue
            image, path = None, row.get("image_path")
            if part is not None and isinstance(path, str) and path:
                image = f"{part}/{PurePosixPath(parse_text(path) or '').name}"  # parts have no subfolders
            elif self.on_error == "raise":
                self.refuse(name, f"image_path is {short(path)}, not a path to a part", NO_IMAGE)
            groups.setdefault(prompt_id, []).append((row, image))
            if not sound:
                refused.add(prompt_id)
        for prompt_id, members in groups.items():
            values = [row.get("rank") for row, _ in members]
            ranks = None if prompt_id in refused else check_ranks(self, prompt_id, "rank", values, len(values))
            if ranks is None and self.on_error == "skip":
                continue
            images, prompt = [image for _, image in members], parse_text(members[0][0].get("prompt")) or ""
            yield ImageGroup(prompt_id, prompt, images, ranks or [UNRANKED] * len(images), prompt_id)


def _find_places(source: str, split: str, parts: Sequence[int] | None, revision: str | None) -> list[Path]:
    folder = Path(source, "images", split)
    if not Path(source).is_dir() and is_hub_id(source):
        if split not in PARTS:
            raise InputError(f"split: no {split!r} in {source}; choose from {', '.join(PARTS)}")
        numbers = range(1, PARTS[split] + 1) if parts is None else parts
        return fetch_files(source, [f"images/{split}/{split}_{number}.zip" for number in numbers], revision)
    found: dict[int, Path] = {}
    for path in reversed(
        find_files(folder, f"{glob.escape(split)}_*")
    ):  # a folder comes after its zip file and replaces it
        number = re.fullmatch(rf"{re.escape(split)}_(\d+)(\.zip)?", path.name)
        if number and (path.is_dir() or number[2]):
            found[int(number[1])] = path
    if missing := [number for number in parts or () if number not in found]:
        raise InputError(f"parts: no {split}_{missing[0]}.zip in {folder}; download it, or leave it out")
    if not found:
        raise InputError(f"split: no {split}_*.zip in {folder}; set source to the folder that holds images/{split}")
    return [found[number] for number in sorted(parts or found)]
