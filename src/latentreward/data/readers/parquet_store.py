"""Access to data sets stored as several parquet files, through ``datasets`` and ``pyarrow``."""

import glob
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.hub import is_hub_id
from latentreward.core.storage.user_files import find_files, split_pattern, whole_file
from latentreward.data.images import ImageError

MAX_OPEN_FILES = 32
VIEWS = {pa.binary_view(): pa.large_binary(), pa.string_view(): pa.large_string()}
LEAST_LIMIT, EXPANSION = 2**30, 20
"""Bytes of values that are read at once from a file of any size, and how many more for each byte of the file."""
KEPT_BYTES = 64 * 2**20
"""Decoded row groups that :class:`RowGroupColumns` keeps, in bytes; at least the last one is kept."""


@dataclass(frozen=True)
class ParquetPart:
    """One parquet file of a split."""

    name: str  # published file name; a download cache renames files
    path: Path  # path of the file on this machine

    def pattern(self) -> str:
        """Return the pattern by which ``datasets``, which takes every name for one, finds the file."""
        return glob.escape(str(self.path.absolute()))


def find_parts(source: str, split: str, revision: str | None = None, config: str | None = None) -> list[ParquetPart]:
    """Find the parquet files of a split, in the order of their names.

    A ``source`` is a folder that holds ``{split}-*.parquet`` or ``{split}.parquet``, directly or in its subfolder
    ``data/`` (or the subfolder ``config``, if given); or one parquet file, or a pattern of files with ``*``, ``?`` or
    ``[]``; otherwise the id of a hub data set, whose files of this split are downloaded.

    Raises:
        InputError: If the folder, data set or split does not exist, or the split is in the folder in both forms.
    """
    folder = Path(source)
    if folder.is_dir():
        places = (folder / (config or "data"), folder)
        for place in places:
            paths, whole = find_files(place, f"{split}-*.parquet"), place / f"{split}.parquet"
            if paths and whole.is_file():
                raise InputError(
                    f"split: {place} has {whole.name} and {paths[0].name}; set source to one file, or move one away"
                )
            if paths or whole.is_file():
                return [ParquetPart(path.name, path) for path in paths or [whole]]
        raise InputError(
            f"split: no {split}-*.parquet or {split}.parquet in {places[1]} or {places[0]}; check the split and the "
            f"folder, or give a pattern{nested_pattern(folder)}"
        )
    if not folder.is_file() and glob.has_magic(source):
        # Rows are named by their file's name, which must therefore differ.
        paths = find_files(*split_pattern(source))
        if not paths:
            raise InputError(f"source: no file matches {source}; give a pattern such as data/*.parquet")
        if twice := next((name for name, files in Counter(path.name for path in paths).items() if files > 1), None):
            raise InputError(
                f"source: {source} matches several files {twice}; rows are named by their file, so rename them"
            )
        return [ParquetPart(path.name, path) for path in paths]
    if folder.is_file() or folder.suffix == ".parquet":
        return [ParquetPart(folder.name, folder)]
    if not is_hub_id(source):
        raise InputError(f"source: no folder {source!r}, and no hub id either; set it to the folder of the data set")
    return [ParquetPart(*file) for file in fetch_split(source, split, ".parquet", revision, config)]


def fetch_split(
    source: str, split: str, ending: str, revision: str | None = None, config: str | None = None
) -> list[tuple[str, Path]]:
    """Download all files of a split of a hub data set; return (published file name, local path) of each, by URL.

    Raises:
        InputError: If the data set or split does not exist, a file has another suffix, or the hub cannot be reached.
    """
    from datasets import DownloadManager, load_dataset_builder  # slow to import

    try:
        builder = load_dataset_builder(source, name=config, revision=revision)
        files = dict(builder.config.data_files or {})
        urls = sorted(files.get(split, []))
        paths = DownloadManager(dataset_name=source).download(urls)
    except (OSError, ValueError) as error:
        problem = f"source: no folder {source!r}, and the hub does not give it"
        raise InputError(f"{problem}: {first_line(error)}") from error
    if not urls or not all(url.endswith(ending) for url in urls):
        kind, splits = ending.removeprefix("."), ", ".join(map(str, files))
        raise InputError(f"split: no {kind} files of {split!r} in {source!r}; it has {splits}")
    return [(url.rsplit("/", 1)[-1], Path(path)) for url, path in zip(urls, paths, strict=True)]


def nested_pattern(folder: Path) -> str:
    """Return the pattern of the first parquet file below a folder, for messages; an empty text if there is none."""
    first = next((path for path in find_files(folder, "**/*.parquet") if not path.is_dir()), None)
    return f", such as {first.parent / '*.parquet'}" if first else ""


def open_part(part: ParquetPart) -> pq.ParquetFile:
    """Open a parquet file; only its footer is read.

    Raises:
        ImageError: If the file is not a whole parquet file.
        InputError: If two columns have one name, or the field ``huggingface``, which ``datasets`` writes, is no JSON.
    """
    with damage_named(part):
        file = pq.ParquetFile(whole_file(part.path), page_checksum_verification=True)
        schema = file.schema_arrow
        names = Counter(schema.names)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"{part.path}: several columns {twice[0]}; write the file again with one of them")
    try:
        json.loads((schema.metadata or {}).get(b"huggingface", b"null"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{part.path}: field huggingface of the metadata is no JSON ({first_line(error)}); write the file again "
            "without it"
        ) from error
    return file


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the same values without the dictionaries and views that few libraries read."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    return VIEWS.get(kind, kind)


def plain_features(part: ParquetPart, columns: Sequence[str] | None = None) -> Any:
    """Return the ``Features`` by which ``datasets`` reads a file, or only ``columns`` of it, as plain types."""
    from datasets import Features  # slow to import

    with open_part(part) as file:
        schema = file.schema_arrow
    found = Features.from_arrow_schema(
        pa.schema([field.with_type(plain_type(field.type)) for field in schema], metadata=schema.metadata)
    )
    return Features({name: found[name] for name in columns or schema.names})


def read_index(
    parts: Sequence[ParquetPart], columns: dict[str, pa.DataType | None], hint: str
) -> tuple[pa.Table, np.ndarray]:
    """Read columns without images from all parts into one table; also return the rows before each part, ``(parts,)``.

    ``columns`` are types to cast to by name, in the order of the result; None keeps the files' type, of several the one
    that holds all values. ``hint`` is the remedy if a file lacks a column or has another type.

    Raises:
        ImageError: If a part is not a whole parquet file.
        InputError: If a column is missing or cannot be cast, or has types that do not go together.
    """
    tables = []
    for part in parts:
        with open_part(part) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise InputError(f"{part.path}: no column {', '.join(missing)}; {hint}")
            with damage_named(part):
                table = read_groups(file, part, columns, range(file.num_row_groups)).select(list(columns))
        tables.append(cast_columns(table, columns, part.path, hint))
    starts = np.cumsum([0, *(table.num_rows for table in tables)])[:-1]
    try:
        return pa.concat_tables(tables, promote_options="permissive").combine_chunks(), starts
    except pa.ArrowException as error:
        raise InputError(f"{parts[0].path}: no types as in the other files ({first_line(error)}); {hint}") from error


def cast_columns(table: pa.Table, columns: dict[str, pa.DataType | None], place: str, hint: str) -> pa.Table:
    """Cast the columns of a table, which are those of ``columns`` in their order; see :func:`read_index`.

    Raises:
        InputError: If a column cannot be cast, or holds text that is not UTF-8.
    """
    for number, (name, kind) in enumerate(columns.items()):
        found = table.column(name)
        try:
            found.validate(full=True)
        except pa.ArrowException as error:
            raise InputError(
                f"{place}: column {name} is damaged ({first_line(error)}); write it again, texts in UTF-8"
            ) from error
        try:
            new = found.cast(plain_type(found.type) if kind is None else kind)
            if kind == pa.bool_() and pa.types.is_primitive(found.type) and not new.cast(found.type).equals(found):
                raise pa.ArrowInvalid("other numbers than 0 and 1")  # NaN and 2 would be true
            table = table.set_column(number, name, new)
        except pa.ArrowException as error:
            raise InputError(f"{place}: column {name} is {found.type}, not {kind}; {hint}") from error
    return table


def row_group_bytes(file: pq.ParquetFile, number: int, columns: Sequence[str]) -> int:
    """Return the decompressed size in bytes of ``columns`` in row group ``number``."""
    group = file.metadata.row_group(number)
    chunks = [group.column(n) for n in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)


def read_groups(file: pq.ParquetFile, part: ParquetPart, columns: Iterable[str], groups: Sequence[int]) -> pa.Table:
    """Read columns of row groups.

    Raises:
        ImageError: If the values take far more memory than the file has bytes: one long value may stand in every row.
    """
    names, most = list(columns), LEAST_LIMIT + EXPANSION * part.path.stat().st_size
    # Every batch repeats the values of a dictionary, which are no more than the row group holds.
    repeating = [name for name in names if not pa.types.is_dictionary(file.schema_arrow.field(name).type)]
    largest = max([row_group_bytes(file, number, repeating) for number in groups], default=0)
    rows = min(2**16, max(1, LEAST_LIMIT // max(1, largest)))
    batches, size = [], 0
    for batch in file.iter_batches(rows, row_groups=groups, columns=names, use_threads=False):
        size += sum(map(plain_bytes, batch.columns))
        if size > most:
            raise ImageError(f"{part.path}: over {most} bytes of values in a file of far fewer; get it again")
        batches.append(batch)
    return pa.Table.from_batches(batches) if batches else file.read_row_groups([], names)


def plain_bytes(values: pa.Array) -> int:
    """Return the bytes of values, each one of a dictionary counted as often as it stands in a row."""
    if not pa.types.is_dictionary(values.type):
        return values.nbytes
    if pa.types.is_primitive(values.type.value_type):
        return values.indices.nbytes
    return pc.sum(pc.binary_length(values.dictionary).take(values.indices)).as_py() or 0


@contextmanager
def damage_named(part: ParquetPart) -> Iterator[None]:
    """Turn pyarrow's errors about a damaged file into an ImageError of one line that names the file.

    ImageError keeps its one line also when a loader's worker process raises it.
    """
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if not part.path.exists():
            raise ImageError(f"{part.path}: does not exist; check the path") from error
        raise ImageError(f"{part.path}: not a whole parquet file ({first_line(error)}); download it again") from error


class RowGroupColumns:
    """Random access to columns of parquet files; the last decoded row groups are kept, up to ``KEPT_BYTES``.

    Reading a row decodes its whole row group, unless that is kept: small files are decoded once, and of large ones a
    group for each row in random order. Open files and decoded groups are not pickled; a forked worker process opens
    its own.

    Args:
        parts: Files with equal columns.
        columns: Columns to read.
    """

    def __init__(self, parts: Sequence[ParquetPart], columns: Sequence[str]) -> None:
        self.parts, self.columns, self.row_groups_read = list(parts), list(columns), 0
        # By process and part, because processes share the position in an open file.
        self._files: OrderedDict[tuple[int, int], tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def read(self, part: int, row: int, columns: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Return the values of ``columns`` (all by default) in row ``row`` of part number ``part``."""
        if (key := (os.getpid(), part)) not in self._files:
            file = open_part(self.parts[part])
            sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            self._files[key] = file, np.cumsum(sizes)
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)[1][0].close()
        file, ends = self._files[key]
        number = int(np.searchsorted(ends, row, side="right"))
        inner, place = row - (int(ends[number - 1]) if number else 0), (part, number)
        with damage_named(self.parts[part]):
            if place not in self._groups:
                size = row_group_bytes(file, number, self.columns)
                # Frees the memory of old groups before the new one is decoded.
                while self._groups and size + sum(table.nbytes for table in self._groups.values()) > KEPT_BYTES:
                    self._groups.popitem(last=False)
                self._groups[place] = read_groups(file, self.parts[part], self.columns, [number])
                self.row_groups_read += 1
            self._groups.move_to_end(place)
            return tuple(self._groups[place].column(name)[inner].as_py() for name in columns or self.columns)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.parts, self.columns)
