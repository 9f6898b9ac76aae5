"""Reader of the released cache of DiNa-LRM ("diffusion-rm"): parquet files with latents of pairs, chosen first."""

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError
from latentreward.core.storage.json_files import read_table, read_text
from latentreward.core.storage.user_files import find_files
from latentreward.data.image_sizes import PUBLISHED_BUCKETS, Bucket
from latentreward.data.readers.base import Contents
from latentreward.data.readers.json_rows import parse_number
from latentreward.data.readers.rows import BadRow, Pair, PairRowParser, Row, RowReader
from latentreward.data.readers.tables import ParquetPart, SplitTable, open_part

LATENTS = ("latent1", "latent2")
SHAPES = ("latent1_shape", "latent2_shape")
INDEX_COLUMNS = ("global_id", "parquet_path", "row_group", "row_index", "width", "height")
DOWNSCALE = 8
HINT = "give the published cache"


class DiffusionRMReader(RowReader):
    """Reader of pairs of latents, (posterior sample − shift) · scale of SD3's VAE, stored as ``np.save`` bytes.

    The rows hold latents, not images; to train on them, import them first with ``latentreward cache``. ``latent1`` is
    the chosen one. A null prompt is read as an empty prompt. Models, votes and confidence are not read.

    An index row names its pair by the file name in ``parquet_path``, the row group, and the row inside the group.
    ``bucket_id`` is not used, because it depends on the writer's list of buckets. Rows are ordered as in the parquet
    files, with placeholders last, because reading in the order of the index could decode a row group for every row.

    A row is bad if its size is none of the 13 published buckets or differs from the shape stated in the parquet file,
    or if it points to a missing file or row. Damaged latents are found when they are decoded.

    Args:
        root: Folder with the parquet files and the index; or one parquet file, with ``index`` null.
        index: Name of the index file in ``root``; null reads every row of every parquet file, of any size.
        split: Name of the split.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    holds: Contents = "latents"
    exif = "ignore"

    def __init__(
        self, root: PathText, index: str | None = "bucket_index.csv", *, split: str = "train", **options: Any
    ) -> None:
        super().__init__("diffusion_rm", split, **options)
        place = Path(root)
        if index is not None and place.is_file():
            raise InputError(f"index: {place} is one file, which has no index {index}; set index to null")
        if index is not None and not (place / index).is_file():
            raise InputError(f"index: no {place / index}; correct root, or set index to null to read every row")
        files = [place] if place.is_file() else find_files(place, "*.parquet")
        if not files:
            raise InputError(f"root: no *.parquet in {place}; set it to the folder of the cache")
        if place.is_dir():
            self.check_inside(place, *files, place / (index or ""))
        self._latents = table = SplitTable([ParquetPart(file.name, file) for file in files])
        schemas = table.schemas()
        for name, schema in schemas:
            if missing := [column for column in ("prompt", *LATENTS) if column not in schema.names]:
                raise InputError(f"{name}: no column {', '.join(missing)}; {HINT}")
        stated = [one for one in SHAPES if all(one in schema.names for _, schema in schemas)]
        columns = dict.fromkeys(["prompt", *stated])
        rows = self._follow(place / index, table.read_index(columns, HINT)) if index else table.records(columns, HINT)
        self.table = PairRowParser(self, self._pairs, sources=None).table(rows)
        self.table = self.table.sort_by("row")
        table.open_images(LATENTS)
        empty = f"root: {root} has no rows left; check the parquet files and the index"
        self.report(f"{root} {index or ''}".rstrip(), empty)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to both latents of a row, named ``FILE:ROW:COLUMN``.

        The name is not a hash: an image may occur twice with other latents, sampled again or in another size.
        """
        if row["row"] is None:  # the placeholder of a bad row
            return [ImageRef("", holds="latents")] * 2
        part, inner = self._latents.place(row["row"])
        place = f"{self._latents.parts[part].name}:{inner}"
        values = zip(LATENTS, self._latents.read(row["row"]), strict=True)
        return [ImageRef(f"{place}:{column}", value, holds="latents") for column, value in values]

    @staticmethod
    def _pairs(name: str, row: dict[str, Any]) -> list[Pair]:
        if "bad" in row:
            raise row["bad"]
        return [{"label": 1.0}]

    def _follow(self, index: Path, read: pa.Table) -> Iterator[Row]:
        """Yield a row for every row of the index; a bad one has no number."""
        groups: dict[str, np.ndarray] = {}  # name of a file → its rows before each row group, and those in all
        for part, start in zip(self._latents.parts, self._latents.starts, strict=True):
            with open_part(part) as file:
                sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            groups[part.name] = np.cumsum([start, *sizes])
        rows, seen = read_table(read_text(index), ".csv"), set[str]()
        rows.restval = ""  # of missing columns at a row's end
        if missing := [name for name in INDEX_COLUMNS if name not in (rows.fieldnames or ())]:
            raise InputError(f"{index}: no column {', '.join(missing)}; give the published bucket_index.csv")
        try:
            for row in rows:
                name = row["global_id"]
                pair_id = f"{index.name}:{name}" if name and name not in seen else f"{index.name}:line {rows.line_num}"
                seen.add(name)
                try:
                    place = self._locate(row, groups, read)
                    yield pair_id, place, {"prompt": read["prompt"][place].as_py()}
                except BadRow as error:
                    yield pair_id, None, {"prompt": "", "bad": error}  # type: ignore[misc]
        except csv.Error as error:
            raise InputError(f"{index}: line {rows.line_num} is not CSV ({error}); write the index again") from error

    def _locate(self, row: dict[str, str], groups: dict[str, np.ndarray], read: pa.Table) -> int:
        """Return the number of the row that an index row means; raise BadRow if it breaks a rule."""
        numbers = {name: parse_number(row[name]) for name in INDEX_COLUMNS[2:]}
        for name, number in numbers.items():
            if number is None or number < 0 or number % 1:
                raise BadRow(f"{name} is {row[name]!r:.40}, not a count", "index row not readable")
        group, inner, width, height = (int(number) for number in numbers.values() if number is not None)
        path = row["parquet_path"]
        file = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
        if file not in groups:
            raise BadRow(f"parquet_path {file!r:.80} is not in the folder", "parquet part missing")
        starts = groups[file]
        if group + 1 >= len(starts) or inner >= starts[group + 1] - starts[group]:
            raise BadRow(f"{file} has no row {inner} in row group {group}", "row beyond the parquet part")
        if Bucket(height, width) not in PUBLISHED_BUCKETS:
            raise BadRow(f"size {height}x{width} is not a bucket", "size is no bucket")
        place, size = int(starts[group]) + inner, [height // DOWNSCALE, width // DOWNSCALE]
        shapes = [read[one][place].as_py() for one in SHAPES if read.num_columns > len(SHAPES)]
        if any(shape is None or shape[-2:] != size for shape in shapes):
            problem = f"size {height}x{width} against latents of {' and '.join(map(str, shapes))}"
            raise BadRow(problem, "latents of another size than the index says")
        return place
