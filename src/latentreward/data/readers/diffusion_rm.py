"""Reader of the released cache of DiNa-LRM ("diffusion-rm"): parquet files with latents of pairs, chosen first."""

import ast
import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError
from latentreward.core.storage.json_files import read_table, read_text
from latentreward.core.storage.user_files import find_files
from latentreward.data.image_sizes import PUBLISHED_BUCKETS, Bucket, sort_buckets
from latentreward.data.readers.base import MAX_VOTES, Contents
from latentreward.data.readers.json_rows import parse_number
from latentreward.data.readers.pair_rows import BadRow, Pair, PairRowParser, Row
from latentreward.data.readers.parquet_store import ParquetPart, RowGroupColumns, damage_named, open_part
from latentreward.data.readers.rows import RowReader

LATENTS = ("latent1", "latent2")
SHAPES = ("latent1_shape", "latent2_shape")
DETAILS = ("model1", "model2", "detailed_results")
INDEX_COLUMNS = ("global_id", "parquet_path", "row_group", "row_index", "width", "height")
DOWNSCALE = 8


class _Part(NamedTuple):
    """Content of a parquet file without latents."""

    columns: tuple[str, ...]  # names
    starts: np.ndarray  # first row number of each row group, and the number of rows
    prompts: list[str | None]  # of every row
    shapes: list[tuple[Any, Any]] | None  # of both latents of every row; None if the file does not state them


class DiffusionRMReader(RowReader):
    """Reader of pairs of latents, (posterior sample − shift) · scale of SD3's VAE, stored as ``np.save`` bytes.

    The rows hold latents, not images; to train on them, import them first with ``latentreward cache``. ``latent1`` is
    the chosen one. A null prompt is read as an empty prompt. Votes and confidence come from ``detailed_results``; the
    published files write 0 to 0 votes where there are none.

    An index row names its pair by the file name in ``parquet_path``, the row group, and the row inside the group.
    ``bucket_id`` is not used, because it depends on the writer's list of buckets. Rows are ordered as in the parquet
    files, with placeholders last, because reading in the order of the index could decode a row group for every row.

    A row falls under ``on_error`` if its size is not a bucket or differs from the shape stated in the parquet file, if
    it points to a missing file or row, or if its prompt is too long. Damaged latents are found when they are decoded.

    Args:
        root: Folder with the parquet files and the index; or one parquet file, with ``index`` null.
        index: Name of the index file in ``root``; null reads every row of every parquet file, of any size.
        split: Name of the split.
        buckets: (height, width) in pixels of the accepted sizes; by default the 13 published buckets.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.

    Raises:
        InputError: If a file or column is missing, no row is left, or a row breaks a rule above under
            ``on_error: raise``.
    """

    holds: Contents = "latents"
    exif = "ignore"

    def __init__(
        self,
        root: PathText,
        index: str | None = "bucket_index.csv",
        *,
        split: str = "train",
        buckets: list[tuple[int, int]] | None = None,
        **options: Any,
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
        self._names = [file.name for file in files]
        parts = [ParquetPart(file.name, file) for file in files]
        tables = {part.name: _read_part(part) for part in parts}
        self._buckets = set(PUBLISHED_BUCKETS if buckets is None else sort_buckets(buckets))
        if index is None:
            counts = enumerate(len(table.prompts) for table in tables.values())
            rows: Iterator[Row] = (
                self._row(f"{self._names[n]}:{row}", tables, n, row) for n, c in counts for row in range(c)
            )
        else:
            rows = self._follow(place / index, tables)
        parser = PairRowParser(self, self._pairs, sources=None)
        table = parser.table(rows, {"part": pa.int32()})
        self.table = table.sort_by([("part", "ascending"), ("row", "ascending")]) if len(table) else table
        stated = [name for name in DETAILS if all(name in table.columns for table in tables.values())]
        self._columns = RowGroupColumns(parts, [*LATENTS, *stated])
        empty = f"root: {root} has no rows left; check the parquet files and the index"
        self.report(f"{root} {index or ''}".rstrip(), empty)

    def read_row(self, index: int) -> dict[str, Any]:
        """Return the values of row ``index`` by column, with those of the parquet file unless it is a placeholder."""
        row = super().read_row(index)
        if row.get("part") is None:
            return row
        stored = self._columns.read(row["part"], row["row"])
        row |= dict(zip(self._columns.columns, stored, strict=True))
        row["model_a"], row["model_b"] = row.get("model1"), row.get("model2")
        return row | _parse_details(row.get("detailed_results"))

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to both latents of a row, named ``FILE:ROW:COLUMN``.

        The name is not a hash: an image may occur twice with other latents, sampled again or in another size.
        """
        if row.get("part") is None:
            return [ImageRef("", holds="latents")] * 2
        place = f"{self._names[row['part']]}:{row['row']}"
        return [ImageRef(f"{place}:{column}", row[column], holds="latents") for column in LATENTS]

    def _row(self, name: str, tables: dict[str, _Part], part: int, row: int) -> Row:
        """Return the row at a place; its part is null for the placeholder of a bad row."""
        return name, row, {"prompt": tables[self._names[part]].prompts[row], "part": part}

    @staticmethod
    def _pairs(name: str, row: dict[str, Any]) -> list[Pair]:
        if "bad" in row:
            raise row["bad"]
        return [{"label": 1.0, "part": row["part"]}]

    def _follow(self, index: Path, tables: dict[str, _Part]) -> Iterator[Row]:
        """Yield a row for every row of the index."""
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
                    yield self._row(pair_id, tables, *self._locate(row, tables))
                except BadRow as error:
                    yield pair_id, 0, {"prompt": "", "bad": error}
        except csv.Error as error:
            raise InputError(f"{index}: line {rows.line_num} is not CSV ({error}); write the index again") from error

    def _locate(self, row: dict[str, str], tables: dict[str, _Part]) -> tuple[int, int]:
        """Return part and row number of an index row; raise BadRow if it breaks a rule."""
        numbers = {name: parse_number(row[name]) for name in INDEX_COLUMNS[2:]}
        for name, number in numbers.items():
            if number is None or number < 0 or number % 1:
                raise BadRow(f"{name} is {row[name]!r:.40}, not a count", "index row not readable")
        group, inner, width, height = (int(number) for number in numbers.values() if number is not None)
        path = row["parquet_path"]
        file = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
        if file not in tables:
            raise BadRow(f"parquet_path {file!r:.80} is not in the folder", "parquet part missing")
        table = tables[file]
        if group + 1 >= len(table.starts) or inner >= table.starts[group + 1] - table.starts[group]:
            raise BadRow(f"{file} has no row {inner} in row group {group}", "row beyond the parquet part")
        if Bucket(height, width) not in self._buckets:
            raise BadRow(f"size {height}x{width} is not a bucket", "size is no bucket")
        place = int(table.starts[group]) + inner
        size = [height // DOWNSCALE, width // DOWNSCALE]
        if table.shapes is not None and any(shape is None or shape[-2:] != size for shape in table.shapes[place]):
            problem = f"size {height}x{width} against latents of {' and '.join(map(str, table.shapes[place]))}"
            raise BadRow(problem, "latents of another size than the index says")
        return self._names.index(file), place


def _read_part(part: ParquetPart) -> _Part:
    with open_part(part) as file:
        names = tuple(file.schema_arrow.names)
        if missing := [name for name in ("prompt", *LATENTS) if name not in names]:
            raise InputError(f"{part.path}: no column {', '.join(missing)}; give the published cache")
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        stated = [name for name in SHAPES if name in names]
        with damage_named(part):
            table = file.read(columns=["prompt", *stated])
    shapes = None
    if len(stated) == len(SHAPES):
        shapes = list(zip(*(table.column(name).to_pylist() for name in SHAPES), strict=True))
    return _Part(names, np.cumsum([0, *sizes]), table.column("prompt").to_pylist(), shapes)


def _parse_details(text: str | None) -> dict[str, Any]:
    """Parse votes for the chosen and the rejected image, and confidence, from the text of ``detailed_results``.

    The text is a Python dict literal, not JSON, with ``votes_chosen``, ``votes_rejected`` and ``confidence``. The
    result is empty if there are no usable votes or both votes are 0.
    """
    try:
        details = ast.literal_eval(text or "{}")
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return {}
    if not isinstance(details, dict):
        return {}
    counts = [details.get(name) for name in ("votes_chosen", "votes_rejected")]
    if not all(isinstance(count, int) and 0 <= count <= MAX_VOTES for count in counts) or not any(counts):
        return {}
    confidence = details.get("confidence")
    return {
        "votes_a": int(counts[0]),
        "votes_b": int(counts[1]),
        "confidence": float(confidence) if isinstance(confidence, int | float) else None,
    }
