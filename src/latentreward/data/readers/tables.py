"""Tables of a split under one interface: lists in JSON, CSV or TSV, parquet files, or a data set of ``datasets``."""

import glob
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.user_files import escapes, split_pattern
from latentreward.data.image_lists import read_rows
from latentreward.data.readers.json_rows import ARRAY_REMEDY, as_object
from latentreward.data.readers.pair_rows import Row, batches
from latentreward.data.readers.parquet_store import (
    ParquetPart,
    RowGroupColumns,
    cast_columns,
    damage_named,
    find_parts,
    open_part,
    plain_features,
    plain_type,
    row_group_bytes,
)
from latentreward.data.readers.parquet_store import read_index as read_parquet
from latentreward.data.readers.rows import RowReader

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Source = PathText | Any
"""Folder, file or hub id; from Python also a ``Dataset`` or ``DatasetDict`` of the library ``datasets``."""

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files by which ``save_to_disk`` marks the folder of a data set, and the folder of several splits."""
LARGE_ROW_GROUP = 64 * 2**20
"""Bytes of a row group above which reading rows in random order is slow."""
LOCATION = "hf://datasets/{}@{}"
SAVE_AGAIN = "write it again with save_to_disk"
LISTS = (".json", ".jsonl", ".csv", ".tsv")
"""Suffixes of tables of text; :func:`read_list` reads them."""
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException)
"""Exceptions that ``datasets`` raises on a damaged folder."""


class SplitTable(ABC):
    """Rows of one split, in the order of their numbers; images are read row by row."""

    @abstractmethod
    def schemas(self) -> list[tuple[str, pa.Schema]]:
        """Return the name, for messages, and the schema of every file of the table."""

    @abstractmethod
    def read_index(self, columns: dict[str, pa.DataType | None], hint: str) -> pa.Table:
        """Read whole columns without images into one table, in the order of ``columns``; to be called once.

        Raises:
            InputError: If a column is missing or cannot be cast, or a file is damaged.
        """

    @abstractmethod
    def row_names(self) -> pa.Array:
        """Return the names of all rows, which do not depend on where the table lies; after :meth:`read_index`."""

    @abstractmethod
    def open_images(self, columns: Sequence[str], memory_map: bool = False) -> None:
        """Prepare :meth:`read` for columns of images; to be called after :meth:`read_index`.

        With ``memory_map``, they are copied once into the cache of ``datasets``, so that a row costs only this row.
        """

    @abstractmethod
    def read(self, row: int, columns: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Return the values of ``columns`` (by default all of :meth:`open_images`) in a row."""

    def records(self, columns: Mapping[str, pa.DataType | None], hint: str) -> Iterator[Row]:
        """Yield name, number and ``columns`` of every row; see :meth:`read_index`, which is called at once."""
        index = self.read_index(dict(columns), hint)
        return self._records(index)

    def _records(self, index: pa.Table) -> Iterator[Row]:
        names = self.row_names()
        for number, row in enumerate(batches(index)):
            yield names[number].as_py(), number, row

    def check_images(self, columns: Sequence[str], hint: str, absent: str = "", lists: bool = False) -> None:
        """Check that the columns of images hold bytes, or the structs that ``datasets`` writes, or ``lists`` of them.

        Raises:
            InputError: If a column does not, or is missing, with the remedy ``hint``, or ``absent`` if all are missing.
        """
        for place, schema in self.schemas():
            if missing := [name for name in columns if name not in schema.names]:
                remedy = absent if absent and len(missing) == len(columns) else hint
                raise InputError(f"{place}: no column {', '.join(missing)}; {remedy}")
            for name in columns:
                kind = schema.field(name).type
                if not holds_images(element_type(kind) if lists else kind):
                    raise InputError(f"{place}: column {name} is {schema.field(name).type}, not images; {hint}")


class _DatasetTable(SplitTable):
    """Table of a ``Dataset``, whose rows stay on disk if they are mapped from there: a row costs only this row.

    Its format and transform are not applied; ``place`` is its name in messages.
    """

    def __init__(self, dataset: "Dataset", split: str, place: str) -> None:
        self._rows, self._split, self._place = dataset.with_format("arrow"), split, place

    def schemas(self) -> list[tuple[str, pa.Schema]]:
        return [(self._place, self._rows.features.arrow_schema)]

    def read_index(self, columns: dict[str, pa.DataType | None], hint: str) -> pa.Table:
        if missing := [name for name in columns if name not in self._rows.column_names]:
            raise InputError(f"{self._place}: no column {', '.join(missing)}; {hint}")
        try:
            table = self._rows.select_columns(list(columns))[:].select(list(columns))
        except DAMAGE as error:
            raise InputError(f"{self._place}: damaged ({first_line(error)}); {SAVE_AGAIN}") from error
        return cast_columns(table, columns, self._place, hint).combine_chunks()

    def row_names(self) -> pa.Array:
        """Return ``SPLIT:ROW`` of every row."""
        return number_rows(self._split, len(self._rows))

    def open_images(self, columns: Sequence[str], memory_map: bool = False) -> None:
        self._images = self._rows.select_columns(list(columns))

    def read(self, row: int, columns: Sequence[str] | None = None) -> tuple[Any, ...]:
        table = self._images[row]
        return tuple(table.column(name)[0].as_py() for name in columns or self._images.column_names)


class _ParquetTable(SplitTable):
    """Table of the parquet files of a split, in the order of the rows."""

    def __init__(self, parts: Sequence[ParquetPart]) -> None:
        self.parts = list(parts)
        self._copy: _DatasetTable | None = None

    def schemas(self) -> list[tuple[str, pa.Schema]]:
        found = []
        for part in self.parts:
            with open_part(part) as file:
                found.append((str(part.path), file.schema_arrow))
        return found

    def read_index(self, columns: dict[str, pa.DataType | None], hint: str) -> pa.Table:
        table, self._starts = read_parquet(self.parts, columns, hint)
        self._rows = len(table)
        return table

    def row_names(self) -> pa.Array:
        """Return ``FILE:ROW`` of every row."""
        rows = np.diff([*self._starts, self._rows]).tolist()
        return pa.concat_arrays([number_rows(part.name, count) for part, count in zip(self.parts, rows, strict=True)])

    def open_images(self, columns: Sequence[str], memory_map: bool = False) -> None:
        self._groups, self._copy = RowGroupColumns(self.parts, columns), None
        if memory_map:
            from datasets import load_dataset  # slow to import

            files, features = [*map(ParquetPart.pattern, self.parts)], plain_features(self.parts[0], columns)
            settings: dict[str, Any] = {"data_files": files, "columns": list(columns), "features": features}
            self._copy = _DatasetTable(load_dataset("parquet", split="train", **settings), "", "")
            self._copy.open_images(columns)

    def read(self, row: int, columns: Sequence[str] | None = None) -> tuple[Any, ...]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        if self._copy is None:
            return self._groups.read(part, row - int(self._starts[part]), columns)
        with damage_named(self.parts[part]):
            return self._copy.read(row, columns)


def open_table(
    reader: RowReader, source: Source, split: str, revision: str | None = None, config: str | None = None
) -> SplitTable:
    """Find the table of a split; missing parquet parts fall under the reader's ``on_error``.

    A ``source`` is a ``Dataset``, a ``DatasetDict`` with the split, a folder that ``save_to_disk`` wrote, or what
    :func:`~latentreward.data.readers.parquet_store.find_parts` takes.

    Raises:
        InputError: If there is no such source or split, or a folder is damaged.
    """
    set_folder(reader, source)
    if not isinstance(source, str | os.PathLike):
        return _DatasetTable(_choose_split(source, split), split, f"source ({type(source).__name__})")
    places = [place for place in (Path(source), Path(source, split)) if (place / SAVED).is_file()]
    if not places and Path(source, SAVED_SPLITS).is_file():
        names = ", ".join(saved_splits(Path(source))) or "none"
        raise InputError(f"split: no {split!r} in {source}; it has {names}")
    if not places:
        return _ParquetTable(find_all_parts(reader, str(source), split, revision, config))
    from datasets import Dataset  # slow to import

    try:  # no code of the folder runs, and no file outside it is read
        reader.check_inside(source, places[0] / SAVED)
        files = [file["filename"] for file in json.loads((places[0] / SAVED).read_bytes())["_data_files"]]
        reader.check_inside(source, *(places[0] / name for name in files))
        return _DatasetTable(Dataset.load_from_disk(str(places[0])), split, str(places[0]))
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"source: {places[0]} is damaged ({first_line(error)}); {SAVE_AGAIN}") from error


def table_rows(
    reader: RowReader,
    table: SplitTable,
    columns: Mapping[str, pa.DataType | None],
    images: Sequence[str],
    hint: str,
    memory_map: bool = False,
    absent: str = "",
) -> Iterator[Row]:
    """Return the rows of a table without images, and let the reader find its two ``images`` there.

    Raises:
        InputError: If a column is missing or of another type, with the remedy ``hint``; ``absent`` without any images.
    """
    table.check_images(images, hint, absent)
    rows = table.records(columns, hint)
    if images:
        table.open_images(images, memory_map)
        reader.images_in = table, images
    return rows


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

    Raises:
        InputError: If the file cannot be read, or is no table.
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


def find_all_parts(
    reader: RowReader, source: str, split: str, revision: str | None = None, config: str | None = None
) -> list[ParquetPart]:
    """Find the parquet files of a split, see :func:`open_table`; missing ones fall under the reader's ``on_error``."""
    parts, place = find_parts(source, split, revision, config), Path(source)
    if place.is_dir() or (glob.has_magic(source) and not place.is_file()):
        reader.check_inside(place if place.is_dir() else split_pattern(source)[0], *(part.path for part in parts))
    found = {match[0] for part in parts for match in re.finditer(r"\d{5}-of-\d{5}", part.name)}
    totals = {name[-5:] for name in found}
    if missing := sorted({f"{n:05d}-of-{total}" for total in totals for n in range(int(total))} - found):
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        problem = f"{split} lacks {len(missing)} of its parquet parts ({names}); download them"
        reader.refuse(source, problem, "parquet part missing", len(missing))
    return parts


def number_rows(place: str, rows: int) -> pa.Array:
    """Return the names ``PLACE:ROW`` of rows that are counted from 0."""
    texts = pa.large_string()
    return pc.binary_join_element_wise(
        pa.scalar(place, texts), pa.array(np.arange(rows)).cast(texts), pa.scalar(":", texts)
    )


def warn_row_groups(table: SplitTable, columns: Sequence[str], name: str) -> None:
    """Log a warning if a row in random order costs a large row group, whose bytes are decoded beside the row itself."""
    sizes = [0]
    for part in table.parts if isinstance(table, _ParquetTable) else ():
        with open_part(part) as file, damage_named(part):
            sizes += [row_group_bytes(file, number, columns) for number in range(file.num_row_groups)]
    if (largest := max(sizes)) > LARGE_ROW_GROUP:
        text = "%s: a random row costs its row group, %d MiB; set memory_map to true to copy the images once"
        logger.warning(text, name, largest >> 20)


def source_name(source: Source) -> str:
    """Return the name of a source in messages."""
    return str(source) if isinstance(source, str | os.PathLike) else f"a {type(source).__name__}"


def saved_splits(folder: Path) -> list[str]:
    """Return the names of the splits that ``save_to_disk`` wrote into a folder.

    Raises:
        InputError: If the folder's list of splits is damaged.
    """
    try:
        names = json.loads((folder / SAVED_SPLITS).read_bytes())["splits"]
        return [name for name in names if not escapes(name) and (folder / name / SAVED).is_file()]
    except DAMAGE as error:
        raise InputError(f"{folder / SAVED_SPLITS}: not a list of splits; {SAVE_AGAIN}") from error


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


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the names of the classes that a column's numbers stand for, as ``datasets`` records them; None without."""
    try:
        kind = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in kind["names"]] if kind["_type"] == "ClassLabel" else None
    except DAMAGE:
        return None


def name_class(classes: Sequence[str] | None, value: Any) -> Any:
    """Return the name of a class in place of its number; None for a number without class, such as −1 for no label.

    Without classes, every value is returned as it is.
    """
    if classes is None or not isinstance(value, int):
        return value
    return classes[value] if 0 <= value < len(classes) else None


def _choose_split(source: Any, split: str) -> "Dataset":
    from datasets import Dataset, IterableDataset  # slow to import

    if isinstance(source, dict):
        if split not in source:
            raise InputError(f"split: no {split!r} in the {type(source).__name__}; it has {', '.join(source)}")
        source = source[split]
    if isinstance(source, Dataset):
        return source
    if isinstance(source, IterableDataset):
        raise InputError(
            "source is an IterableDataset, whose rows have no numbers; load it without streaming=True, or train on it "
            "by PairStream in StreamedPreferenceDataModule"
        )
    raise InputError(f"source is {source_name(source)}; give a folder, a hub id, or a Dataset of the library datasets")


def fetch_files(source: str, names: Sequence[str], revision: str | None = None, extract: bool = False) -> list[Path]:
    """Download files of a hub data set, or find them in the cache; return their local paths.

    With ``extract``, archives are unpacked, and the folders with their contents are returned.

    Raises:
        InputError: If the data set or a file does not exist, or the hub cannot be reached.
    """
    from datasets import DownloadManager  # slow to import

    manager = DownloadManager(dataset_name=source, base_path=LOCATION.format(source, revision or "main"))
    try:
        paths = (manager.download_and_extract if extract else manager.download)(list(names))
    except (OSError, ValueError) as error:
        problem = f"no folder {source!r}, and the hub does not give {names[0]} of it"
        raise InputError(f"{problem}: {first_line(error)}") from error
    return [Path(str(path)) for path in paths]
