"""Results of a row for one seed, JSON files that are small enough to be committed, and verdicts on its claims."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from latentreward.errors import InputError, first_line
from latentreward.metrics.bootstrap import RESAMPLES, Interval, percentile_ends, resample_sums
from latentreward.storage.durable import write_file
from latentreward.storage.json_files import STRICT, checked, read_config
from tools.reproduction.measuring import Values
from tools.reproduction.rows import Claim, Row, Side
from tools.source_digests import module_names, source_digest

AGAIN = "remove it to measure again"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t distribution with 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Result:
    """Measured values of one row and seed."""

    __pydantic_config__ = STRICT
    config: str  # :meth:`Row.config_digest` at the time of the measurement
    source: str  # digest of the source files that the row's processes imported
    modules: Mapping[str, str]  # those files' modules, grouped by package
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]*\+?$")]  # of the checkout; ``+`` at its end if files differed
    measured: Mapping[str, Mapping[str, Any]]  # arm → metric → packed values
    tasks: Mapping[str, Annotated[float, Field(ge=0)]]  # key of a task → its processor time in seconds
    machine: Mapping[str, Any]  # processor and system
    versions: Mapping[str, str]  # versions of Python and packages

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
            content = read_config(path, remedy=AGAIN)
            result: Result = checked(Result, content, f"{path} is damaged: ", AGAIN)
            if result.config == row.config_digest(seed):
                _check(result, row, path)
                found[seed] = result
    return found


def _check(result: Result, row: Row, path: Path) -> None:
    """Check what the page and the verdicts read of a result, which may have been sent by somebody else."""
    wanted = {(arm, metric) for arm in row.arms for metric in row.metrics}
    found = {(arm, metric) for arm, metrics in result.measured.items() for metric in metrics}
    try:
        if differing := found ^ wanted:
            raise ValueError(f"metrics of arms missing or unknown: {', '.join(map(' of '.join, sorted(differing)))}")
        for place in wanted:
            result.values(Side(*place))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from error


Word = Literal["holds", "does not hold", "undecided", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """What the measured numbers say about a claim.

    It holds if both intervals lie wholly on the claim's side, and does not hold if both lie wholly on the other side.
    It is not measured with fewer than two seeds.
    """

    word: Word
    difference: Interval  # of the two sides, over resampled seeds and items
    over_seeds: Interval  # of the same difference, by Student's t over seeds


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


def crossed_interval(differences: np.ndarray) -> Interval:
    """Compute the mean of paired differences and its 95 % interval by resampling runs and items, independently.

    Every run is measured on the same items, so one draw of items serves all runs of a resample (unlike
    :func:`bootstrap_interval`, which draws items anew within each run). ``differences`` are ``(runs, items)``; with one
    run only items are resampled.
    """
    runs, items = differences.shape
    # The number of drawn items is counted, because bundles of items may differ in size.
    sums = resample_sums(np.column_stack([differences.T, np.ones(items)]))
    means = sums[:, :-1] / sums[:, -1:]
    drawn = np.random.default_rng(1).integers(runs, size=(RESAMPLES, runs))
    means = np.take_along_axis(means, drawn, axis=1).mean(axis=1)
    return Interval(float(differences.mean()), *percentile_ends(means), items)


def student_interval(means: Sequence[float]) -> Interval:
    """Compute the mean over runs and its 95 % interval by Student's t, which includes the variation between trainings.

    There is one mean per run; the ends are NaN with one run.

    Raises:
        ValueError: If there are more than 10 runs.
    """
    if len(means) > len(STUDENT) + 1:
        raise ValueError(f"{len(means)} runs: quantiles are known for up to {len(STUDENT) + 1}")
    value = float(np.mean(means))
    if len(means) < 2:
        return Interval(value, np.nan, np.nan, len(means))
    spread = STUDENT[len(means) - 2] * float(np.std(means, ddof=1)) / len(means) ** 0.5
    return Interval(value, value - spread, value + spread, len(means))
