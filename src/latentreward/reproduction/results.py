"""Results of a row for one seed: JSON files that are small enough to be committed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentreward.reproduction.measuring import Values
from latentreward.reproduction.rows import Row, Side
from latentreward.reproduction.sources import module_names, source_digest
from latentreward.storage.durable import write_file
from latentreward.storage.json_files import read_config


@dataclass(frozen=True)
class Result:
    """Measured values of one row and seed.

    Attributes:
        config: :meth:`Row.config_digest` at the time of the measurement.
        source: Digest of the source files that the row's processes imported.
        modules: Those files' modules, grouped by package.
        commit: Commit of the checkout; ``+`` at its end if files differed.
        measured: Arm → metric → packed values.
        tasks: Key of a task → its processor time in seconds.
        machine: Processor and system.
        versions: Versions of Python and packages.
    """

    config: str
    source: str
    modules: Mapping[str, str]
    commit: str
    measured: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, float]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    def values(self, side: Side) -> Values:
        """Return the values of each item of one arm and metric."""
        return Values.unpacked(self.measured[side.arm][side.metric])

    @property
    def stale(self) -> bool:
        """Whether a source file that the row's processes imported has changed."""
        return source_digest(module_names(self.modules)) != self.source


def result_path(folder: Path, row: Row, seed: int) -> Path:
    """Return the file of a row's result for a seed."""
    return folder / row.name / f"seed{seed}.json"


def write_result(path: Path, result: Result) -> None:
    """Write a result atomically."""
    write_file(path, json.dumps(vars(result), indent=1, ensure_ascii=False) + "\n")


def read_results(folder: Path, row: Row) -> dict[int, Result]:
    """Read the results of a row by seed, without those of other settings of the row.

    Raises:
        InputError: If a file is damaged.
    """
    found = {}
    for seed in range(row.seeds):
        path = result_path(folder, row, seed)
        if path.is_file():
            result = Result(**read_config(path))
            if result.config == row.config_digest(seed):
                found[seed] = result
    return found
