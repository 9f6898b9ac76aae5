"""Results of a row for one seed, JSON files that are small enough to be committed, and verdicts on its claims."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.errors import InputError, first_line
from latentreward.metrics.bootstrap import Interval
from latentreward.storage.durable import write_file
from latentreward.storage.json_files import read_config
from tools.reproduction.intervals import crossed_interval, student_interval
from tools.reproduction.measuring import Values
from tools.reproduction.rows import Claim, Row, Side
from tools.source_digests import module_names, source_digest

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


Word = Literal["holds", "does not hold", "undecided", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """What the measured numbers say about a claim.

    Attributes:
        word: ``holds`` if both intervals lie wholly on the claim's side, ``does not hold`` if both lie wholly on the
            other side, else ``undecided``; ``not measured`` with fewer than two seeds.
        difference: Difference of the two sides, with the interval over resampled seeds and items.
        over_seeds: The same difference, with Student's t interval over seeds.
    """

    word: Word
    difference: Interval
    over_seeds: Interval


UNKNOWN = Interval(np.nan, np.nan, np.nan)


def judge_claim(claim: Claim, results: Sequence[Result], row: Row) -> Verdict:
    """Judge a claim by the results of a row's seeds.

    Raises:
        InputError: If the two sides, or the seeds, were measured on different items.
    """
    if len(results) < 2:
        return Verdict("not measured", UNKNOWN, UNKNOWN)
    differences, items = [], set()
    for result in results:
        higher = result.values(claim.higher)
        lower = (
            Values(higher.items, np.zeros_like(higher.values)) if claim.lower is None else result.values(claim.lower)
        )
        if lower.items != higher.items:
            raise InputError(f"{row.name}: {claim.says!r} compares different items; give both sides the same ones")
        differences.append(higher.values - lower.values)
        items.add(higher.items)
    if len(items) > 1:
        raise InputError(f"{row.name}: its seeds were measured on different items; measure them again with --stale")
    return judge(np.stack(differences), claim.more_than)


def judge(differences: np.ndarray, more_than: float = 0.0) -> Verdict:
    """Judge whether a mean difference exceeds ``more_than``.

    ``differences`` ``(seeds, items)`` are those of the side that should be higher minus the other.
    """
    intervals = crossed_interval(differences), student_interval(differences.mean(axis=1).tolist())
    word: Word = "undecided"
    if all(one.low > more_than for one in intervals):
        word = "holds"
    elif all(one.high < more_than for one in intervals):
        word = "does not hold"
    return Verdict(word, *intervals)
