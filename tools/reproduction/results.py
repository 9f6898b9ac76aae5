"""Results of a row for one seed: JSON files that are small enough to be committed."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from latentreward.errors import InputError, first_line
from latentreward.steps.sources import module_names, source_digest
from latentreward.storage.durable import write_file
from latentreward.storage.json_files import read_config
from tools.reproduction.measuring import Values
from tools.reproduction.rows import Row, Side

COMMIT = re.compile(r"[0-9a-f]*\+?")


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
            content = read_config(path, remedy="remove it to measure again")
            if content.keys() != {one.name for one in fields(Result)}:
                raise InputError(f"{path} is damaged: entries are missing or unknown; remove it to measure again")
            result = Result(**content)
            if result.config == row.config_digest(seed):
                _check(result, row, path)
                found[seed] = result
    return found


def _check(result: Result, row: Row, path: Path) -> None:
    """Check what the page and the verdicts read of a result, which may have been sent by somebody else."""
    try:
        for what, found, known in (
            ("arms", result.measured, row.arms),
            *((f"metrics of {arm}", metrics, row.metrics) for arm, metrics in result.measured.items()),
        ):
            if differing := found.keys() ^ {*known}:
                raise ValueError(f"{what}: {', '.join(sorted(differing))} are missing or unknown")
        for arm in row.arms:
            for metric in row.metrics:
                result.values(Side(arm, metric))
        for task, seconds in result.tasks.items():
            if type(seconds) is not float or not 0 <= seconds < math.inf:
                raise ValueError(f"tasks: {task} took {seconds!r} s")
        module_names(result.modules)
        if not COMMIT.fullmatch(result.commit):
            raise ValueError(f"commit is {result.commit!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); remove it to measure again") from error
