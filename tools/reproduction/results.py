"""Results of a row for one seed, JSON files that are small enough to be committed, and what they say on its claims."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.durable import write_file
from latentreward.core.storage.json_files import STRICT, checked, read_config
from tools.reproduction.measuring import Values
from tools.reproduction.rows import LEAST_SEEDS, MOST_SEEDS, WHOLE, Claim, Row, Side
from tools.reproduction.verdicts import UNKNOWN, Sample, Verdict, judge
from tools.source_digests import module_names, source_digest

AGAIN = "remove it to measure again"
SEEDS = range(WHOLE + MOST_SEEDS)
"""Seeds that a row may have results of."""


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
    for seed in SEEDS:
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


def sample_of(claim: Claim, results: Mapping[int, Result], row: Row) -> Sample | None:
    """Take the differences of a claim's sides from the results of a row's seeds; None with too few of them.

    Once there are whole repetitions, the seeds that share their training pairs count as one, by their mean. A row that
    is judged once has no sample before its last repetition.

    Raises:
        InputError: If the two sides, or the seeds, were measured on different items.
    """
    differences, items = {}, set()
    for seed, result in results.items():
        higher, lower = result.values(claim.higher), claim.lower and result.values(claim.lower)
        if lower and lower.items != higher.items:
            raise InputError(f"{row.name}: {claim.says!r} compares different items; give both sides the same ones")
        differences[seed] = higher.values - (lower.values if lower else 0.0) - claim.more_than
        items.add(higher.items)
    if len(items) > 1:
        raise InputError(f"{row.name}: its seeds were measured on different items; measure them again with --stale")
    shared = [values for seed, values in differences.items() if seed < WHOLE]
    whole = [values for seed, values in differences.items() if seed >= WHOLE]
    if row.once:
        return Sample(np.stack(whole), once=True) if len(whole) == row.seeds else None
    together = [np.mean(shared, axis=0)] if shared else []
    if len(together) + len(whole) >= LEAST_SEEDS:
        return Sample(np.stack([*together, *whole]), looked=bool(shared))
    return Sample(np.stack(shared), whole=False) if len(shared) >= LEAST_SEEDS else None


def judge_claim(claim: Claim, results: Mapping[int, Result], row: Row) -> Verdict:
    """Judge a claim by the results of a row's seeds, as :func:`sample_of` takes them."""
    sample, margin = sample_of(claim, results, row), row.metrics[claim.higher.metric].margin
    assert margin is not None, "checked when the row was read"
    return judge(sample, margin.size, claim.more_than) if sample else Verdict("not measured", UNKNOWN, UNKNOWN)
