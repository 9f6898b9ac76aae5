"""Tables of a split under one interface: parquet files, lists in JSON, CSV or TSV, or a data set of ``datasets``."""

import glob
import logging
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.hub import is_hub_id
from latentreward.core.storage.user_files import find_files, split_pattern, whole_file
from latentreward.data.image_lists import read_rows
from latentreward.data.images import ImageError
from latentreward.data.readers.json_rows import ARRAY_REMEDY, as_object
from latentreward.data.readers.rows import Row, RowReader, batches

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Source = PathText | Any
"""Folder, file or hub id; from Python also a ``Dataset`` or ``DatasetDict`` of the library ``datasets``."""
Columns = Mapping[str, pa.DataType | None]
"""Names of columns without images → types to cast to; None keeps the files' type."""

MAX_OPEN_FILES = 32
VIEWS = {pa.binary_view(): pa.large_binary(), pa.string_view(): pa.large_string()}
LEAST_LIMIT, EXPANSION = 2**30, 20
"""Bytes of values that are read at once from a file of any size, and how many more for each byte of the file."""
KEPT_BYTES = 64 * 2**20
"""Decoded row groups that :class:`RowGroupColumns` keeps, in bytes; at least the last one is kept."""
LARGE_ROW_GROUP = 64 * 2**20
"""Bytes of a row group above which reading rows in random order is slow."""
HINT = "give the published files, or read your own by DatasetPairReader"
LISTS = (".json", ".jsonl", ".csv", ".tsv")
"""Suffixes of tables of text; :func:`read_list` reads them."""
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException)
"""Exceptions that ``datasets`` raises on damaged files."""


@dataclass(frozen=True)
class ParquetPart:
    """One parquet file of a split."""

    name: str  # published file name; a download cache renames files
    path: Path  # path of the file on this machine

    def pattern(self) -> str:
        """Return the pattern by which ``datasets``, which takes every name for one, finds the file."""
        return glob.escape(str(self.path.absolute()))


def find_parts(
    reader: RowReader, source: str, split: str, revision: str | None = None, config: str | None = None
) -> list[ParquetPart]:
    """Find the parquet files of a split, by name; missing ones of numbered files fall under the reader's ``on_error``.

    A ``source`` is a folder that holds ``{split}-*.parquet`` or ``{split}.parquet``, directly or in its subfolder
    ``data/`` (or the subfolder ``config``, if given); or one parquet file, or a pattern of files with ``*``, ``?`` or
    ``[]``; otherwise the id of a hub data set, whose files of this split are downloaded.
    """
    place = Path(source)
    if place.is_dir():
        paths = _in_folder(place, split, config)
        reader.check_inside(place, *paths)
    elif not place.is_file() and glob.has_magic(source):
        paths = find_files(*split_pattern(source))
        if not paths:
            raise InputError(f"source: no file matches {source}; give a pattern such as data/*.parquet")
        names = Counter(path.name for path in paths)
        if len(names) < len(paths):
            told = f"{source} matches several files {names.most_common(1)[0][0]}"
            raise InputError(f"source: {told}; rows are named by their file, so rename them")
        reader.check_inside(split_pattern(source)[0], *paths)
    elif place.is_file() or place.suffix == ".parquet":
        paths = [place]
    elif is_hub_id(source):
        return _all_there(reader, source, split, _fetch(source, split, revision, config))
    else:
        raise InputError(f"source: no folder {source!r}, and no hub id either; set it to the folder of the data set")
    return _all_there(reader, source, split, [ParquetPart(path.name, path) for path in paths])


def _in_folder(folder: Path, split: str, config: str | None) -> list[Path]:
    for place in (folder / (config or "data"), folder):
        paths, whole = find_files(place, f"{split}-*.parquet"), place / f"{split}.parquet"
        if paths and whole.is_file():
            told = f"{place} has {whole.name} and {paths[0].name}"
            raise InputError(f"split: {told}; set source to one file, or move one away")
        if paths or whole.is_file():
            return paths or [whole]
    raise InputError(
        f"split: no {split}-*.parquet or {split}.parquet in {folder} or {folder / (config or 'data')}; check the split "
        "and the folder, or give a pattern of files"
    )


def _all_there(reader: RowReader, source: str, split: str, parts: list[ParquetPart]) -> list[ParquetPart]:
    found = {match[0] for part in parts for match in re.finditer(r"\d{5}-of-\d{5}", part.name)}
    totals = {name[-5:] for name in found}
    if missing := sorted({f"{n:05d}-of-{total}" for total in totals for n in range(int(total))} - found):
        problem = f"{split} lacks {len(missing)} of its parquet parts ({', '.join(missing[:3])}); download them"
        reader.refuse(source, problem, "parquet part missing", len(missing))
    return parts


def _fetch(source: str, split: str, revision: str | None, config: str | None) -> list[ParquetPart]:
    """Download all files of a split of a hub data set."""
    from datasets import DownloadManager, load_dataset_builder  # slow to import

    try:
        builder = load_dataset_builder(source, name=config, revision=revision)
        files = dict(builder.config.data_files or {})
        urls = sorted(files.get(split, []))
        paths = DownloadManager(dataset_name=source).download(urls)
    except (OSError, ValueError) as error:
        problem = f"source: no folder {source!r}, and the hub does not give it"
        raise InputError(f"{problem}: {first_line(error)}") from error
    if not urls or not all(url.endswith(".parquet") for url in urls):
        raise InputError(f"split: no parquet files of {split!r} in {source!r}; it has {', '.join(map(str, files))}")
    return [ParquetPart(url.rsplit("/", 1)[-1], Path(path)) for url, path in zip(urls, paths, strict=True)]


def open_part(part: ParquetPart) -> pq.ParquetFile:
    """Open a parquet file, of which only the footer is read and checked."""
    with damage_named(part):
        return pq.ParquetFile(whole_file(part.path), page_checksum_verification=True)


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
    fields = [field.with_type(plain_type(field.type)) for field in schema]
    found = Features.from_arrow_schema(pa.schema(fields, metadata=schema.metadata))
    return Features({name: found[name] for name in columns or schema.names})


def read_parquet(parts: Sequence[ParquetPart], columns: Columns, hint: str) -> tuple[pa.Table, np.ndarray]:
    """Read columns without images from all parts into one table; also return the rows before each part, ``(parts,)``.

    Of several types of a column, the one that holds all values is taken. ``hint`` is the remedy if a file lacks a
    column or has another type.
    """
    tables = []
    for part in parts:
        with open_part(part) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise InputError(f"{part.path}: no column {', '.join(missing)}; {hint}")
            with damage_named(part):
                table = read_groups(file, part, list(columns), range(file.num_row_groups)).select(list(columns))
        tables.append(cast_columns(table, columns, str(part.path), hint))
    starts = np.cumsum([0, *(table.num_rows for table in tables)])[:-1]
    try:
        return pa.concat_tables(tables, promote_options="permissive").combine_chunks(), starts
    except pa.ArrowException as error:
        raise InputError(f"{parts[0].path}: no types as in the other files ({first_line(error)}); {hint}") from error


def cast_columns(table: pa.Table, columns: Columns, place: str, hint: str) -> pa.Table:
    """Cast the columns of a table, which are those of ``columns`` in their order; see :func:`read_parquet`."""
    for number, (name, kind) in enumerate(columns.items()):
        found = table.column(name)
        try:
            found.validate(full=True)
        except pa.ArrowException as error:
            told = f"column {name} is damaged ({first_line(error)})"
            raise InputError(f"{place}: {told}; write it again, texts in UTF-8") from error
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


def read_groups(file: pq.ParquetFile, part: ParquetPart, names: Sequence[str], groups: Sequence[int]) -> pa.Table:
    """Read columns of row groups; refuse values that take far more memory than the file has bytes."""
    most = LEAST_LIMIT + EXPANSION * part.path.stat().st_size
    # One long value may stand in every row. Every batch repeats the values of a dictionary, which are no more than the
    # row group holds.
    repeating = [name for name in names if not pa.types.is_dictionary(file.schema_arrow.field(name).type)]
    largest = max([row_group_bytes(file, number, repeating) for number in groups], default=0)
    rows = min(2**16, max(1, LEAST_LIMIT // max(1, largest)))
    found, size = [], 0
    for batch in file.iter_batches(rows, row_groups=groups, columns=names, use_threads=False):
        size += sum(map(plain_bytes, batch.columns))
        if size > most:
            raise ImageError(f"{part.path}: over {most} bytes of values in a file of far fewer; get it again")
        found.append(batch)
    return pa.Table.from_batches(found) if found else file.read_row_groups([], names)


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


class SplitTable:
    """Rows of one split in parquet files, in the order of their numbers; images are read row by row."""

    name = ""  # of source and split, for messages

    def __init__(self, parts: Sequence[ParquetPart]) -> None:
        self.parts = list(parts)
        self._copy: SplitTable | None = None

    def schemas(self) -> list[tuple[str, pa.Schema]]:
        """Return the name, for messages, and the schema of every file of the table."""
        found = []
        for part in self.parts:
            with open_part(part) as file:
                found.append((str(part.path), file.schema_arrow))
        return found

    def read_index(self, columns: Columns, hint: str) -> pa.Table:
        """Read whole columns without images into one table, in the order of ``columns``; to be called once."""
        table, self.starts = read_parquet(self.parts, columns, hint)
        self.rows = len(table)
        return table

    def row_names(self) -> Iterator[str]:
        """Yield the names of all rows, which do not depend on where the table lies; after :meth:`read_index`."""
        counts = np.diff([*self.starts, self.rows]).tolist()
        for part, count in zip(self.parts, counts, strict=True):
            yield from (f"{part.name}:{row}" for row in range(count))

    def open_images(self, columns: Sequence[str], memory_map: bool = False) -> None:
        """Prepare :meth:`read` for columns of images; to be called after :meth:`read_index`.

        With ``memory_map``, they are copied once into the cache of ``datasets``, so that a row costs only this row.
        Otherwise large row groups, whose bytes are decoded beside a row, are warned of.
        """
        self._groups, self._copy = RowGroupColumns(self.parts, columns), None
        if memory_map:
            from datasets import load_dataset  # slow to import

            files, features = [*map(ParquetPart.pattern, self.parts)], plain_features(self.parts[0], columns)
            settings: dict[str, Any] = {"data_files": files, "columns": list(columns), "features": features}
            self._copy = _DatasetTable(load_dataset("parquet", split="train", **settings), "", "")
            self._copy.open_images(columns)
            return
        largest = 0
        for part in self.parts:
            with open_part(part) as file, damage_named(part):
                largest = max([largest, *(row_group_bytes(file, n, columns) for n in range(file.num_row_groups))])
        if largest > LARGE_ROW_GROUP:
            text = "%s: a random row costs its row group, %d MiB; set memory_map to true to copy the images once"
            logger.warning(text, self.name, largest >> 20)

    def read(self, row: int, columns: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Return the values of ``columns`` (by default all of :meth:`open_images`) in a row."""
        part, inner = self.place(row)
        if self._copy is None:
            return self._groups.read(part, inner, columns)
        with damage_named(self.parts[part]):
            return self._copy.read(row, columns)

    def place(self, row: int) -> tuple[int, int]:
        """Return the number of a row's file, and of the row in it; after :meth:`read_index`."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, row - int(self.starts[part])

    def records(self, columns: Columns, hint: str) -> Iterator[Row]:
        """Yield name, number and ``columns`` of every row; see :meth:`read_index`, which is called at once."""
        index = self.read_index(columns, hint)
        return ((name, n, row) for n, (name, row) in enumerate(zip(self.row_names(), batches(index), strict=True)))

    def check_images(self, columns: Sequence[str], hint: str, absent: str = "", lists: bool = False) -> None:
        """Check that columns hold images, in bytes or structs of ``datasets``, or ``lists`` of them; see the hints."""
        for place, schema in self.schemas():
            if missing := [name for name in columns if name not in schema.names]:
                remedy = absent if absent and len(missing) == len(columns) else hint
                raise InputError(f"{place}: no column {', '.join(missing)}; {remedy}")
            for name in columns:
                kind = schema.field(name).type
                if not holds_images(element_type(kind) if lists else kind):
                    raise InputError(f"{place}: column {name} is {kind}, not images; {hint}")


class _DatasetTable(SplitTable):
    """Table of a ``Dataset``, whose rows stay on disk if they are mapped from there: a row costs only this row.

    Its format and transform are not applied; ``place`` is its name in messages.
    """

    def __init__(self, dataset: "Dataset", split: str, place: str) -> None:
        self._rows, self._split, self._place = dataset.with_format("arrow"), split, place

    def schemas(self) -> list[tuple[str, pa.Schema]]:
        return [(self._place, self._rows.features.arrow_schema)]

    def read_index(self, columns: Columns, hint: str) -> pa.Table:
        if missing := [name for name in columns if name not in self._rows.column_names]:
            raise InputError(f"{self._place}: no column {', '.join(missing)}; {hint}")
        try:
            table = self._rows.select_columns(list(columns))[:].select(list(columns))
        except DAMAGE as error:
            raise InputError(f"{self._place}: damaged ({first_line(error)}); make it anew") from error
        return cast_columns(table, columns, self._place, hint).combine_chunks()

    def row_names(self) -> Iterator[str]:
        return (f"{self._split}:{row}" for row in range(len(self._rows)))

    def open_images(self, columns: Sequence[str], memory_map: bool = False) -> None:
        self._images = self._rows.select_columns(list(columns))

    def read(self, row: int, columns: Sequence[str] | None = None) -> tuple[Any, ...]:
        table = self._images[row]
        return tuple(table.column(name)[0].as_py() for name in columns or self._images.column_names)


def open_table(
    reader: RowReader, source: Source, split: str, revision: str | None = None, config: str | None = None
) -> SplitTable:
    """Find the table of a split: a ``Dataset``, a ``DatasetDict`` with it, or parquet files."""
    set_folder(reader, source)
    if isinstance(source, str | os.PathLike):
        table = SplitTable(find_parts(reader, str(source), split, revision, config))
    else:
        table = _DatasetTable(_choose_split(source, split), split, f"source ({type(source).__name__})")
    table.name = f"{source_name(source)} {split}"
    return table


def _choose_split(source: Any, split: str) -> "Dataset":
    from datasets import Dataset, IterableDataset  # slow to import

    if isinstance(source, dict):
        if split not in source:
            raise InputError(f"split: no {split!r} in the {type(source).__name__}; it has {', '.join(source)}")
        source = source[split]
    if isinstance(source, Dataset):
        return source
    if isinstance(source, IterableDataset):
        told = "source is an IterableDataset, whose rows have no numbers; load it without streaming=True"
        raise InputError(f"{told}, or train on it by PairStream in StreamedPreferenceDataModule")
    raise InputError(f"source is {source_name(source)}; give a folder, a hub id, or a Dataset of the library datasets")


def find_list(source: Source, split: str) -> Path | None:
    """Return the table of text of a split: the file ``source``, or the split's in this folder; else None."""
    if not isinstance(source, str | os.PathLike):
        return None
    if (place := Path(source)).suffix.lower() in LISTS and not place.is_dir():
        return place
    files = (place / f"{split}{suffix}" for suffix in LISTS)
    return next((file for file in files if file.is_file()), None)


def read_list(file: Path) -> Iterator[Row]:
    """Yield ``FILE:NUMBER``, number and fields of each row of a table of text.

    The number is that of the line; of an item of a JSON list, from 0. An empty cell of CSV or TSV is null.
    """
    suffix = file.suffix.lower()
    if suffix in (".json", ".csv", ".tsv") and not file.is_file():
        raise InputError(f"split: no file {file}; correct the path, or the folder and the split")
    for number, value, problem in read_rows(file, ARRAY_REMEDY):
        row, place = as_object(value, problem), number - (suffix == ".json")
        if suffix in (".csv", ".tsv") and isinstance(row, dict):
            row = {name: cell or None for name, cell in row.items()}
        yield f"{file.name}:{place}", place, row


def set_folder(reader: RowReader, source: Source) -> None:
    """Give a reader without a folder that of its table; rows of a table made in this process may name any file."""
    if reader.folder is None and not isinstance(source, str | os.PathLike):
        reader.folder, reader.allow_outside = Path(), True
    elif reader.folder is None:
        place = Path(source)
        inner = not place.is_dir() and (place.is_file() or glob.has_magic(str(source)))
        reader.folder = split_pattern(str(source))[0] if inner else place


def source_name(source: Source) -> str:
    """Return the name of a source in messages."""
    return str(source) if isinstance(source, str | os.PathLike) else f"a {type(source).__name__}"


def element_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the elements of lists, and any other type as it is."""
    listed = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if any(holds(kind) for holds in listed) else kind


def holds_images(kind: pa.DataType) -> bool:
    """Tell whether a column's type is bytes, or a struct with bytes such as ``datasets`` writes for images."""
    kind = plain_type(kind)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
