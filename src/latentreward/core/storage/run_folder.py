"""Output of a run in parts, and the record of its settings, by which a later run goes on there or is refused."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from latentreward.core.errors import InputError, first_line
from latentreward.core.interrupts import interrupts_held
from latentreward.core.storage.durable import KEPT, contents, locked, refuse_link, replacing, write_file
from latentreward.core.storage.json_files import read_config
from latentreward.core.storage.user_files import whole_file

DIGEST = re.compile(r", [0-9a-f]{32}\b")  # digest at the end of a fingerprint, which messages leave out


@dataclass(frozen=True)
class RunFolder:
    """Output of a run, and the JSON file of the settings that it depends on; with others nothing is overwritten."""

    output: Path  # File or folder that the run writes
    record: Path  # File with the settings; the files beside it are the run's too
    spec: Mapping[str, Any]  # Settings, as JSON can hold them
    option: str  # Name of the option that chose ``output``
    remedy: str  # What to do if the output is not of these settings
    kept: str = KEPT  # End of the message on a full disk

    def exists(self) -> bool:
        """Tell whether there is a record; raises InputError if there is none, but other files are in its folder."""
        folder = self.record.parent
        found = self.record.is_file()
        if not found and folder.exists() and (not folder.is_dir() or contents(folder)):
            raise InputError(f"{self.option}: {folder} holds other files and no {self.record.name}; {self.remedy}")
        return found

    def compare(self) -> None:
        """Compare the recorded settings with those of this run."""
        if difference := first_difference(read_config(self.record, remedy=self.remedy), self.spec):
            raise InputError(f"{self.option}: {self.output} was begun with {difference}; {self.remedy}")

    def claim(self, made: bool = True) -> None:
        """Write the record; other settings are accepted if the earlier run has not ``made`` anything of them."""
        if self.exists() and made:
            self.compare()
        self.write()

    def write(self) -> None:
        """Write the record of the settings."""
        write_file(self.record, json.dumps(self.spec, indent=1), self.kept)


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe the first setting that differs between two runs; None if none does."""
    before, now = (json.loads(json.dumps(settings)) for settings in (before, now))
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            return _difference(name, before.get(name), now.get(name))
    return None


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe how two values of a setting differ, of mappings the first entry that does; digests are left out."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.keys() != now.keys():
            return _difference(name, ", ".join(before), ", ".join(now))
        entry = next(entry for entry in now if before[entry] != now[entry])
        return _difference(f"{name}.{entry}", before[entry], now[entry])
    old, new = quoted(before), quoted(now)
    if old != new:
        return f"{name} {old}, now it is {new}"
    return f"{name} {old}, whose contents (files, prompts or weights behind that name) have changed"


def quoted(value: Any) -> str:
    """Quote a value from JSON in a message: at most 80 characters, without digests."""
    text = "none" if value is None else DIGEST.sub("", json.dumps(value))
    return text if len(text) <= 80 else text[:77] + "..."


SPEC = "spec.json"  # file in the parts' folder that records the spec


class PartFiles:
    """Parquet parts in the folder ``OUTPUT.parts/``, joined to the file ``output`` when all ``rows`` are written.

    Inside, as a context manager, no other process can write the same output. ``OUTPUT.json`` records the ``spec`` of a
    finished table, the settings that its rows depend on. Parts or a table of another spec are refused.
    """

    def __init__(self, output: Path, spec: Mapping[str, Any], rows: int) -> None:
        self.output, self.rows = output, rows
        self.folder = output.with_name(f"{output.name}.parts")
        note = output.with_name(f"{output.name}.json")
        self._kept = f"what was scored is kept in {self.folder}: free some space and run the same command again"
        remedy = "choose another output, or delete"
        record = partial(RunFolder, output, spec=spec, option="output", kept=self._kept)
        self._begun = record(record=self.folder / SPEC, remedy=f"{remedy} {self.folder}")
        self._finished = record(record=note, remedy=f"{remedy} {output} and {note}")
        self._held = ExitStack()

    def __enter__(self) -> Self:
        if self.output.suffix not in WRITERS:  # not before: each rank makes the object, and the first one enters it
            raise InputError(f"output is {self.output}; it must end in .parquet or .csv")
        if self.finished():
            return self
        refuse_link(self.folder)
        if self.output.exists() and not self.folder.exists():
            raise InputError(f"output: {self.output} is there already; choose another file, or delete it")
        with ExitStack() as held:
            held.enter_context(locked(self.folder, "output"))
            self._begun.claim(made=bool(self.parts()))
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; raise a Ctrl-C or SIGTERM again with a message that says what is kept."""
        self._held.close()
        if isinstance(error, KeyboardInterrupt) and self.folder.exists():
            kept = f"{sum(map(len, self.parts()))} of {self.rows} rows are kept in {self.folder}"
            raise type(error)(f"{kept}: the same command goes on there") from error

    def finished(self) -> bool:
        """Tell whether the complete table exists, made from this spec, and remove parts that are left over."""
        if not (self.output.exists() and self._finished.record.exists()):
            return False
        self._finished.compare()
        shutil.rmtree(self.folder, ignore_errors=True)  # a kill at the end of `finish` may have left the folder
        return True

    def parts(self) -> dict[range, Path]:
        """List the finished parts: range of rows → file, by ascending rows."""
        names = {path: re.fullmatch(r"rows_(\d+)_(\d+)\.parquet", path.name) for path in self.folder.glob("rows_*")}
        found = [(int(match[1]), int(match[2]), path) for path, match in names.items() if match]
        end = 0
        for start, stop, path in sorted(found):
            if not end <= start < stop <= self.rows:
                problem = f"its rows are in the part before it too, or none of the table's {self.rows}"
                raise InputError(f"{path}: {problem}; delete {path.name}")
            end = stop
        return {range(start, stop): path for start, stop, path in sorted(found)}

    def missing(self, length: int) -> list[range]:
        """List the ranges of rows that no part holds, each of at most ``length`` rows."""
        open_rows = np.ones(self.rows, dtype=bool)
        for rows in self.parts():
            open_rows[rows.start : rows.stop] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[False], open_rows, [False]]).astype(np.int8)))
        runs = [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
        return [range(at, min(at + length, stop)) for start, stop in runs for at in range(start, stop, length)]

    def write(self, rows: range, table: pa.Table) -> None:
        """Write a part with the given rows; after the return, the part survives a kill and a power loss."""
        path = self.folder / f"rows_{rows.start:09d}_{rows.stop:09d}.parquet"
        with interrupts_held(), replacing(path, self._kept) as partial:
            pq.write_table(table, partial, write_page_checksum=True)

    def read(self) -> Iterator[tuple[range, pa.Table]]:
        """Yield each part's range of rows and table, by ascending rows; raises InputError if one is damaged."""
        columns: list[str] = []
        for rows, path in self.parts().items():
            try:
                table = pq.read_table(path.absolute(), page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                problem = f"{path}: damaged ({first_line(error)})"
                raise InputError(f"{problem}; delete it, and its rows are made anew") from error
            columns = columns or table.column_names
            if table.num_rows != len(rows) or table.column_names != columns:
                found = f"{table.num_rows} rows of {quoted(table.column_names)}, not {len(rows)} of {quoted(columns)}"
                raise InputError(f"{path}: {found}; delete the part that is wrong, and its rows are made anew")
            yield rows, table

    def finish(self) -> None:
        """Join the parts into ``output``, record the spec beside it, and remove the parts."""
        parts = self.read()
        _, first = next(parts)
        writer_of = WRITERS[self.output.suffix]
        with replacing(self.output, self._kept) as partial, writer_of(partial, first.schema) as writer:
            writer.write_table(first)
            for _, table in parts:
                writer.write_table(table)
        self._finished.write()
        shutil.rmtree(self.folder)


WRITERS: dict[str, Callable[[Path, pa.Schema], Any]] = {
    ".parquet": partial(pq.ParquetWriter, write_page_checksum=True),
    ".csv": pa_csv.CSVWriter,
}
"""File name extension → class that writes such a table."""


BLOCK = 1 << 26  # Largest length of a row of CSV or JSON lines, in bytes


def load_table(path: Path, texts: Sequence[str], **nulls: bool) -> pa.Table:
    """Read a file by its suffix; ``texts`` are columns of text, and ``nulls`` say what of CSV is null."""
    file = whole_file(path)
    if path.suffix == ".parquet":
        return pq.read_table(file, page_checksum_verification=True)
    if path.suffix == ".jsonl":
        return pa_json.read_json(file, pa_json.ReadOptions(block_size=BLOCK))
    columns = pa_csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()), **nulls)
    lines = pa_csv.ParseOptions(newlines_in_values=True)
    return pa_csv.read_csv(file, pa_csv.ReadOptions(block_size=BLOCK), lines, columns)
