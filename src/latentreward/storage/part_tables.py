"""A table that grows in parts, each whole or absent, so that a run killed at any moment goes on where it was."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from latentreward.errors import InputError, first_line
from latentreward.interrupts import interrupts_held
from latentreward.storage.durable import replacing, write_file
from latentreward.storage.locks import locked

SPEC = "spec.json"
DIGEST = re.compile(r", [0-9a-f]{32}\b")
"""End of a fingerprint."""


class PartFiles:
    """Rows of ``output``, kept as parquet parts in ``OUTPUT.parts/`` until the last one is there.

    Use it as a context manager: inside, no other process can work on the same output. ``OUTPUT.json`` says what a
    finished table was made from.

    Args:
        output: File that ends in ``.parquet``, ``.csv`` or ``.jsonl``.
        spec: What the rows depend on, as JSON takes it; another spec is refused.
        rows: Number of rows of the whole table.

    Raises:
        InputError: If ``output`` has another ending, is there but was not made from ``spec``, was begun with another
            spec, or is being written by another process.
    """

    def __init__(self, output: Path, spec: Mapping[str, Any], rows: int) -> None:
        if output.suffix not in WRITERS:
            raise InputError(f"output is {output}; it must end in .parquet, .csv or .jsonl")
        self.output, self.spec, self.rows = output, dict(spec), rows
        self.folder = output.with_name(f"{output.name}.parts")
        self._note = output.with_name(f"{output.name}.json")
        self._kept = f"what was scored is kept in {self.folder}: free some space and run the same command again"
        self._held = ExitStack()

    def __enter__(self) -> Self:
        if self.finished():
            return self
        if self.output.exists() and not self.folder.exists():
            raise InputError(f"output: {self.output} is there already; choose another file, or delete it")
        with ExitStack() as held:
            held.enter_context(locked(self.folder, "output"))
            if (self.folder / SPEC).exists() and self.parts():
                self._compare(self.folder / SPEC, f"delete {self.folder}")
            else:
                self._write_json(self.folder / SPEC)
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the output; a Ctrl-C or SIGTERM is told what is kept."""
        self._held.close()
        if isinstance(error, KeyboardInterrupt) and self.folder.exists():
            kept = f"{sum(map(len, self.parts()))} of {self.rows} rows are kept in {self.folder}"
            raise type(error)(f"{kept}: the same command goes on there") from error

    def finished(self) -> bool:
        """Whether the whole table is there.

        Raises:
            InputError: If it was made from another spec.
        """
        if not (self.output.exists() and self._note.exists()):
            return False
        self._compare(self._note, f"delete {self.output} and {self._note}")
        shutil.rmtree(self.folder, ignore_errors=True)  # a kill in the last moment may have left it
        return True

    def parts(self) -> dict[range, Path]:
        """Finished parts by their rows, ascending."""
        names = {path: re.fullmatch(r"rows_(\d+)_(\d+)\.parquet", path.name) for path in self.folder.glob("rows_*")}
        return {range(int(match[1]), int(match[2])): path for path, match in sorted(names.items()) if match}

    def missing(self, length: int) -> list[range]:
        """Rows that no part has, in runs of at most ``length``."""
        open_rows = np.ones(self.rows, dtype=bool)
        for rows in self.parts():
            open_rows[rows.start : rows.stop] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[False], open_rows, [False]]).astype(np.int8)))
        runs = [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
        return [range(at, min(at + length, stop)) for start, stop in runs for at in range(start, stop, length)]

    def write(self, rows: range, table: pa.Table) -> None:
        """Add a part; once this returns it survives a kill and a loss of power."""
        path = self.folder / f"rows_{rows.start:09d}_{rows.stop:09d}.parquet"
        with interrupts_held(), replacing(path, self._kept) as partial:
            pq.write_table(table, partial)

    def read(self) -> Iterator[tuple[range, pa.Table]]:
        """Parts with their rows.

        Raises:
            InputError: If one is damaged.
        """
        for rows, path in self.parts().items():
            try:
                table = pq.read_table(path)
            except (pa.ArrowException, OSError) as error:
                raise InputError(
                    f"{path}: damaged ({first_line(error)}); delete it, and its rows are made anew"
                ) from error
            if table.num_rows != len(rows):
                raise InputError(f"{path}: {table.num_rows} rows; delete it, and its rows are made anew")
            yield rows, table

    def finish(self) -> None:
        """Put the parts together as ``output`` and remove them."""
        parts = self.read()
        _, first = next(parts)
        writer_of = WRITERS[self.output.suffix]
        with replacing(self.output, self._kept) as partial, writer_of(partial, first.schema) as writer:
            writer.write_table(first)
            for _, table in parts:
                writer.write_table(table)
        self._write_json(self._note)
        shutil.rmtree(self.folder)

    def _write_json(self, path: Path) -> None:
        write_file(path, json.dumps(self.spec, indent=1), self._kept)

    def _compare(self, file: Path, remedy: str) -> None:
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"{file} is damaged ({first_line(error)}); {remedy}") from error
        for key in self.spec:
            if found.get(key) != self.spec[key]:
                raise InputError(
                    f"output: {self.output} was begun with {_difference(key, found.get(key), self.spec[key])}; choose "
                    f"another output, or {remedy}"
                )


class JSONLinesWriter:
    """Tables to a file of JSON lines; what is null, NaN or infinite becomes null.

    Args:
        path: The file.
        schema: Of the tables.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file, self._schema = path.open("w", encoding="utf-8"), schema

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def write_table(self, table: pa.Table) -> None:
        """Add rows."""
        columns = [_json_values(table.column(name)) for name in self._schema.names]
        for row in zip(*columns, strict=True):
            self._file.write(json.dumps(dict(zip(self._schema.names, row, strict=True)), ensure_ascii=False) + "\n")


WRITERS: dict[str, Callable[[Path, pa.Schema], Any]] = {
    ".parquet": pq.ParquetWriter,
    ".csv": pa_csv.CSVWriter,
    ".jsonl": JSONLinesWriter,
}
"""Ending of a table's name -> what writes it."""


def _json_values(column: pa.ChunkedArray) -> list[Any]:
    """Values as JSON takes them; a number gets no more digits than its type has."""
    values = column.to_pylist()
    if not pa.types.is_floating(column.type):
        return values
    kind = column.type.to_pandas_dtype()
    return [None if value is None or not np.isfinite(value) else float(str(kind(value))) for value in values]


def _difference(name: str, before: Any, now: Any) -> str:
    """What was and what is; of mappings the first entry that differs, of fingerprints the names alone."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.keys() != now.keys():
            return _difference(name, ", ".join(before), ", ".join(now))
        entry = next(entry for entry in now if before[entry] != now[entry])
        return _difference(f"{name}.{entry}", before[entry], now[entry])
    old, new = _short(before), _short(now)
    return f"{name} {old}, whose contents have changed" if old == new else f"{name} {old}, now it is {new}"


def _short(value: Any) -> str:
    text = "none" if value is None else DIGEST.sub("", json.dumps(value))
    return text if len(text) <= 80 else text[:77] + "..."
