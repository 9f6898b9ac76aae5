"""Reader of folders that img2dataset writes: single images with captions and further columns, compared by a column."""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError, did_you_mean
from latentreward.core.storage.json_files import UnreadableTextError
from latentreward.core.storage.user_files import find_files
from latentreward.data.readers.folders import read_caption
from latentreward.data.readers.json_rows import parse_json, parse_number, parse_text, short
from latentreward.data.readers.pair_rows import BadRow, Pair, PairRowParser, Row, batches, pack, ranked_pairs
from latentreward.data.readers.parquet_store import ParquetPart, RowGroupColumns, open_part, read_index
from latentreward.data.readers.rows import RowReader
from latentreward.data.readers.tables import holds_images
from latentreward.data.readers.tars import read_extent, whole_samples

ENCODED = ("jpg", "png", "webp")
"""Values of img2dataset's ``encode_format``, the suffixes of its images and the names of its column of images."""
CAPTION, TEXT, META = "caption", "txt", "json"
STATUS, SUCCESS = "status", "success"
STATS = "*_stats.json"
"""Files that img2dataset writes beside every finished shard."""
HINT = "give the folder that img2dataset wrote"
NAMED_KEYS = 12
UNREADABLE = "txt or json not readable"
COLUMNS = pa.schema(
    {
        "name": pa.large_string(),  # SHARD/KEY
        "caption": pa.large_string(),
        "group": pa.large_string(),  # value that it shares with the other images of its group
        "rating": pa.float64(),  # number by which it is compared with them
        "unreadable": pa.large_string(),  # rating that is no number, for messages
        **dict.fromkeys(("shard", "offset", "size"), pa.int64()),  # where the image lies
    }
)
"""Table of all images; Python's objects would take many times the memory."""


class Img2DatasetReader(RowReader):
    """Reader of a folder that img2dataset wrote, in its formats ``webdataset``, ``files`` or ``parquet``.

    Such a folder holds single images. Images of one caption, or of one value of the column ``group``, are a group, and
    each pair of a group's images is a row, labelled by the column ``rating``. Both columns come from img2dataset's
    option ``save_additional_columns``. Equal ratings are ties and are kept. Pairs of an image without a rating are
    unlabelled. Images without a caption or without the column ``group`` are left out and counted, as are images that
    img2dataset could not download; a caption or value that only one image has gives no row.

    An image whose ``.json`` cannot be read falls under ``on_error``, as does a group as a whole if it has a rating
    that is not a number, more than ``max_group`` images, several captions, or a caption that is too long.

    The constructor reads captions and columns of all images once: the headers and texts of tars, a ``.json`` for each
    image of ``files``, or the columns without images of parquet files. Images are read row by row, at their place.

    Args:
        root: Folder with the shards: ``00000.tar``, …; or ``00000/000000000.jpg``, …; or ``00000.parquet``, … with a
            column ``jpg``, ``png`` or ``webp``.
        split: Name of the split.
        rating: Name of the column by which images are compared; null leaves all pairs unlabelled.
        best: Which rating is the best one: ``highest`` for scores, ``lowest`` for ranks.
        group: Name of the column whose value the images of a group share.
        max_group: Largest number of images in a group; n images give n (n − 1) / 2 rows.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`. Of a truncated tar, the whole
            samples are kept under ``skip`` and ``placeholder``.

    Raises:
        InputError: If the folder has no shards, no image has the columns, no group has two images, or a rule above is
            broken under ``on_error: raise``.
    """

    def __init__(
        self,
        root: PathText,
        split: str = "train",
        *,
        rating: str | None = None,
        best: Literal["highest", "lowest"] = "highest",
        group: str = CAPTION,
        max_group: int = 16,
        **options: Any,
    ) -> None:
        super().__init__("img2dataset", split, randomise_sides=False, seed=0, **options)
        self.folder, self._rating, self._group = Path(root), rating, group
        self._best, self._max_group = best, max_group
        self._columns: RowGroupColumns | None = None
        self._shards, read = self._find_shards()
        self.check_inside(root, *self._shards)
        self._keys: set[str] = set()
        shards = (pack(filter(None, read(shard)), COLUMNS) for shard in range(len(self._shards)))
        images = pa.concat_tables(shards)
        for setting, column in (("rating", rating), ("group", None if group == CAPTION else group)):
            if column is not None and column not in self._keys:
                known = ", ".join(sorted(self._keys)[:NAMED_KEYS]) or "none"
                hint = did_you_mean(column, self._keys) or f"; columns: {known}"
                raise InputError(f"{setting}: no image of {root} has the column {column!r}{hint}")
        # Groups of one image are left out; the images of each other group come to lie behind its first one.
        groups = images["group"].combine_chunks().dictionary_encode().indices.to_numpy()
        sizes = np.bincount(groups)
        if alone := int((sizes == 1).sum()):
            self.skipped[f"only image of its {group}"] += alone
        order = np.argsort(groups, kind="stable")
        images = images.take(order[sizes[groups[order]] > 1])
        place = pa.list_(pa.int64(), 3)
        parser = PairRowParser(self, self._pairs, sources=None)
        self.table = parser.table(self._make_groups(images), {"place_a": place, "place_b": place})
        self.report(str(root), f"root: no two images of {root} share a {group}; set group to a column that they share")

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to two images: with their bytes from a tar or parquet file, or with their paths."""
        images = []
        for (shard, *place), name in ((row[f"place_{side}"], row[f"image_{side}"]) for side in "ab"):
            if self._columns is not None:
                images += self.embedded_images(self._columns.read(shard, place[0]), [name])
            elif self._shards[shard].is_dir():
                images.append(self.file_image(name))
            else:
                with self._shards[shard].open("rb", buffering=0) as tar:
                    images.append(ImageRef(name or "", read_extent(tar, place)))
        return images

    def has_files(self) -> bool:
        return self._shards[0].is_dir()

    def _find_shards(self) -> tuple[list[Path], Callable[[int], Iterator[dict[str, Any] | None]]]:
        if not self.folder.is_dir():
            raise InputError(f"root: no folder {self.folder}; {HINT}")
        if tars := find_files(self.folder, "*.tar"):
            return tars, self._read_tar
        parts = [ParquetPart(path.name, path) for path in find_files(self.folder, "*.parquet")]
        if parts:
            with open_part(parts[0]) as file:
                schema = file.schema_arrow
            named = [name for name in ENCODED if name in schema.names and holds_images(schema.field(name).type)]
            if named:  # beside img2dataset's other formats, parquet files hold no images
                self._columns = RowGroupColumns(parts, named[:1])
                return [part.path for part in parts], self._read_parquet
        if folders := [path for path in find_files(self.folder, "*") if path.is_dir() and any(_pictures(path))]:
            return folders, self._read_folder
        raise InputError(f"root: no *.tar, no folder of images and no parquet with images in {self.folder}; {HINT}")

    def _read_tar(self, shard: int) -> Iterator[dict[str, Any] | None]:
        tar = self._shards[shard]
        for sample in whole_samples(self, tar, ENCODED, (TEXT, META)):
            for extent in sample.images.values():
                problem = next(iter(sample.unreadable.values()), "")
                texts = sample.texts.get(TEXT), sample.texts.get(META)
                yield self._parse(f"{tar.stem}/{sample.key}", *texts, problem, (shard, *extent))

    def _read_folder(self, shard: int) -> Iterator[dict[str, Any] | None]:
        folder = self._shards[shard]
        for picture in _pictures(folder):
            text = meta = None
            problem = ""
            try:
                text, meta = (read_caption(picture.with_suffix(f".{end}"), self.root) for end in (TEXT, META))
            except UnreadableTextError as error:
                problem = str(error)
            yield self._parse(f"{folder.name}/{picture.name}", text, meta, problem, (shard, 0, 0))

    def _read_parquet(self, shard: int) -> Iterator[dict[str, Any] | None]:
        file = self._shards[shard]
        part = ParquetPart(file.name, file)
        with open_part(part) as opened:
            names = opened.schema_arrow.names
        self._keys |= {*names}
        wanted = dict.fromkeys(("key", TEXT, CAPTION, STATUS, self._group, self._rating or ""))
        columns: dict[str, pa.DataType | None] = {name: None for name in wanted if name in names}
        index, _ = read_index([part], {**columns, "key": pa.string()}, HINT)
        for row, facts in enumerate(index.to_pylist()):
            if (status := facts.get(STATUS)) not in (SUCCESS, None):
                self.skipped[f"not downloaded ({short(status)})"] += 1
                continue
            yield self._image(f"{file.stem}/{facts['key'] or row}", facts.get(TEXT), facts, (shard, row, 0))

    def _parse(
        self, name: str, text: str | None, meta: str | None, problem: str, place: tuple[int, int, int]
    ) -> dict[str, Any] | None:
        """Return the row of an image by its ``.txt`` and ``.json``; None, after ``on_error``, if one has a problem."""
        facts = parse_json(meta, None) if meta is not None else {}
        if not problem and isinstance(facts, dict):
            self._keys |= facts.keys()
            return self._image(name, text, facts, place)
        self.refuse(name, problem or f"{META} is {short(meta)}, not an object", UNREADABLE)
        if self.on_error == "placeholder":  # an image without caption has no row to hold a place in
            self.skipped[UNREADABLE] += self.remarks.pop(UNREADABLE)
        return None

    def _image(self, name: str, text: Any, facts: dict[str, Any], place: tuple[int, int, int]) -> dict[str, Any] | None:
        """Return the row of an image; None, which is counted, if it belongs to no group."""
        caption = parse_text(text) or parse_text(facts.get(CAPTION))
        value = caption if self._group == CAPTION else facts.get(self._group)
        if _is_null(value) or not str(value).strip():
            self.skipped[f"no {self._group}"] += 1
            return None
        group = parse_text(str(value))
        given = facts.get(self._rating) if self._rating else None
        rating = parse_number(given)
        unreadable = short(given) if rating is None and not _is_null(given) else None
        values = (parse_text(name), caption, group, rating, parse_text(unreadable), *place)
        return dict(zip(COLUMNS.names, values, strict=True))

    def _make_groups(self, images: pa.Table) -> Iterator[Row]:
        """Yield a row for each group of a table in which the images of each group follow one another."""
        for number, (value, group) in enumerate(groupby(batches(images), itemgetter("group"))):
            members = list(group)
            yield (
                members[0]["name"],
                number,
                {"prompt": members[0]["caption"] or "", "members": members, "value": value},
            )

    def _pairs(self, name: str, row: dict[str, Any]) -> list[Pair]:
        members, told = row["members"], f"with {self._group} {short(row['value'])}"
        problem, reason = "", "rating not readable"
        if len(members) > self._max_group:
            problem = f"{len(members)} images {told}, more than max_group={self._max_group}"
            reason, members = "group too large", members[: self._max_group]  # a placeholder
        elif (captions := len({member["caption"] or "" for member in members})) > 1:
            problem, reason = f"{captions} captions {told}", "several captions"
        elif odd := next((member for member in members if member["unreadable"] is not None), None):
            problem = f"{self._rating} is {odd['unreadable']}, not a number"
        sign = -1 if self._best == "highest" else 1
        ranks = [None if problem or one["rating"] is None else sign * one["rating"] for one in members]
        fields = [{"place": [one["shard"], one["offset"], one["size"]]} for one in members]
        shared = {"group": name, "group_id": row["value"]}
        pairs = ranked_pairs(name, [one["name"] for one in members], ranks, fields, **shared)
        if problem:
            raise BadRow(problem, reason, pairs)
        if missing := ranks.count(None):
            hint = "the reader's setting rating names its column"
            self.remarks[f"image without {self._rating or 'a rating'} ({hint})"] += missing
        return pairs


def _is_null(value: Any) -> bool:
    """Tell whether a column has no value; parquet may have NaN in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for kind in ENCODED for path in find_files(folder, f"*.{kind}"))
