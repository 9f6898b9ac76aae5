"""Files and random access of data sets stored as parquet shards, through ``datasets`` and ``pyarrow``."""

import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentreward.data.images import ImageError
from latentreward.errors import InputError

MAX_OPEN_FILES = 32


@dataclass(frozen=True)
class ParquetPart:
    """One parquet file of a split: its published name, and where it lies (a download cache renames files)."""

    name: str
    path: Path


def find_parts(source: str, split: str, revision: str | None = None) -> list[ParquetPart]:
    """The files of a split, in the order of their names.

    Args:
        source: Folder with ``{split}-*.parquet``, itself or in ``data/``; otherwise the id of a data set on the hub,
            whose files of this split are downloaded as they are.
        split: Name of the split.
        revision: Commit, tag or branch of the hub data set.

    Raises:
        InputError: If there is no such folder, data set or split.
    """
    folder = Path(source)
    if folder.is_dir():
        for place in (folder / "data", folder):
            paths = sorted(place.glob(f"{split}-*.parquet"))
            if paths:
                return [ParquetPart(path.name, path) for path in paths]
        raise InputError(
            f"split: no {split}-*.parquet in {folder} or {folder / 'data'}; check the split and the folder"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise InputError(f"source: no folder {source!r}, and no hub id either; set it to the folder of the data set")
    return _download(source, split, revision)


def missing_parts(parts: Sequence[ParquetPart]) -> list[str]:
    """What the names ``…-00003-of-00012…`` say is lacking, as ``"00003-of-00012"``."""
    found = {match[0] for part in parts for match in re.finditer(r"\d{5}-of-\d{5}", part.name)}
    totals = {name[-5:] for name in found}
    return sorted({f"{n:05d}-of-{total}" for total in totals for n in range(int(total))} - found)


def _download(source: str, split: str, revision: str | None) -> list[ParquetPart]:
    from datasets import DownloadManager, load_dataset_builder  # slow to import

    try:
        builder = load_dataset_builder(source, revision=revision)
        files = dict(builder.config.data_files or {})
        urls = sorted(files.get(split, []))
        paths = DownloadManager(dataset_name=source).download(urls)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"source: no folder {source!r}, and the hub does not give it: {reason}") from error
    if not urls or not all(url.endswith(".parquet") for url in urls):
        raise InputError(f"split: no parquet files of {split!r} in {source!r}; it has {', '.join(map(str, files))}")
    return [ParquetPart(url.rsplit("/", 1)[-1], Path(path)) for url, path in zip(urls, paths, strict=True)]


def open_part(part: ParquetPart) -> pq.ParquetFile:
    """Open a part; only its footer is read.

    Raises:
        ImageError: If it is no whole parquet file.
    """
    with damage_named(part):
        return pq.ParquetFile(part.path)


@contextmanager
def damage_named(part: ParquetPart) -> Iterator[None]:
    """Turn pyarrow's errors over a damaged file into one line that names it; it reaches the user from workers too."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ImageError(f"{part.path}: not a whole parquet file ({reason}); download it again") from error


class RowGroupColumns:
    """Random access to columns of parquet parts, one decoded row group at a time.

    A row costs its whole row group, unless the row before came from the same group. Open files and the last group
    belong to a process: they do not travel to workers, and a forked worker opens its own.

    Args:
        parts: Files with equal columns.
        columns: Columns to read.
    """

    def __init__(self, parts: Sequence[ParquetPart], columns: Sequence[str]) -> None:
        self.parts, self.columns = list(parts), list(columns)
        self._start()

    def read(self, part: int, row: int) -> tuple[Any, ...]:
        """Values of the columns in row ``row`` of part number ``part``."""
        if self._process != os.getpid():
            self._start()
        file, ends = self._open(part)
        number = int(np.searchsorted(ends, row, side="right"))
        group = self._read_group(file, part, number)
        inner = row - (int(ends[number - 1]) if number else 0)
        return tuple(group.column(name)[inner].as_py() for name in self.columns)

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self.row_groups_read = 0
        self._process = os.getpid()
        self._files: OrderedDict[int, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        self._group: tuple[int, int, pa.Table] | None = None

    def _open(self, part: int) -> tuple[pq.ParquetFile, np.ndarray]:
        if part not in self._files:
            file = open_part(self.parts[part])
            sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            self._files[part] = file, np.cumsum(sizes)
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)[1][0].close()
        return self._files[part]

    def _read_group(self, file: pq.ParquetFile, part: int, number: int) -> pa.Table:
        if self._group is None or self._group[:2] != (part, number):
            self._group = None  # lets go of the old group before the new one is decoded
            with damage_named(self.parts[part]):
                table = file.read_row_group(number, columns=self.columns, use_threads=False)
            self._group = part, number, table
            self.row_groups_read += 1
        return self._group[2]


class ArrowColumns:
    """The same access after a one-time copy into the memory-mapped cache of ``datasets``: a row costs only itself.

    Args:
        parts: Files with equal columns.
        columns: Columns to copy; the cache takes as much disk as they do.
        starts: ``(parts,)`` number of rows before each part.
    """

    def __init__(self, parts: Sequence[ParquetPart], columns: Sequence[str], starts: np.ndarray) -> None:
        from datasets import load_dataset  # slow to import

        self.columns, self.starts = list(columns), starts
        files = [str(part.path) for part in parts]
        self._rows = load_dataset("parquet", data_files=files, split="train", columns=self.columns)
        self._rows = self._rows.with_format("arrow")

    def read(self, part: int, row: int) -> tuple[Any, ...]:
        """Values of the columns in row ``row`` of part number ``part``."""
        table = self._rows[int(self.starts[part]) + row]
        return tuple(table.column(name)[0].as_py() for name in self.columns)
