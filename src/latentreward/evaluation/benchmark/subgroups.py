"""A protocol's number on sub-groups of the pairs, at each noise level, and as difference of two scorers."""

from collections.abc import Iterable, Sequence

import numpy as np

from latentreward.errors import InputError
from latentreward.evaluation.benchmark.columns import SUBGROUP_COLUMNS
from latentreward.evaluation.benchmark.protocols import Judgement, credit_sums, judge
from latentreward.evaluation.benchmark.results import (
    BenchmarkPairs,
    DifferenceResult,
    LevelResult,
    SubgroupResult,
)
from latentreward.metrics.bootstrap import clustered_accuracy, clustered_interval, ratio_difference

Judged = tuple[BenchmarkPairs, Judgement]


def subgroup_results(
    key: str,
    pairs: BenchmarkPairs,
    judgement: Judgement,
    columns: Sequence[str] = SUBGROUP_COLUMNS,
    least: int = 1,
) -> list[SubgroupResult]:
    """Compute the protocol's number on each sub-group, larger sub-groups of a column first.

    Sub-groups with fewer than ``least`` counted pairs, and columns that the pairs lack, are left out.
    """
    results = []
    for column in (name for name in columns if name in pairs.columns):
        found = [_subgroup(key, pairs, judgement, column, *item) for item in _members(pairs.columns[column]).items()]
        results += sorted((item for item in found if item.pairs >= least), key=lambda item: (-item.pairs, item.value))
    return results


def _members(values: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Return the rows of each value; a row whose value has several lines belongs to each line."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        for line in value.split("\n") if value else ():
            rows.setdefault(line, []).append(row)
    return {value: np.array(members) for value, members in rows.items()}


def _subgroup(
    key: str, pairs: BenchmarkPairs, judgement: Judgement, column: str, value: str, rows: np.ndarray
) -> SubgroupResult:
    credit = np.full(len(judgement.credit), np.nan)
    credit[rows] = judgement.credit[rows]
    estimate = clustered_accuracy(credit_sums(key, pairs, credit))
    number = int((~np.isnan(credit)).sum())
    return SubgroupResult(key, pairs.scorer, column, value, number, estimate, pairs.split)


def paired_difference(key: str, first: Judged, second: Judged) -> DifferenceResult:
    """Compute the difference of two scorers on the pairs that count for both, with the interval of the difference.

    Raises:
        InputError: If the two scorers scored different pairs.
    """
    (pairs, judgement), (others, other) = first, second
    if pairs.pair_ids != others.pair_ids:
        raise InputError(f"{pairs.scorer} and {others.scorer} scored other pairs; score both on the same split")
    both = ~np.isnan(judgement.credit) & ~np.isnan(other.credit)
    credits = (np.where(both, item.credit, np.nan) for item in (judgement, other))
    sums = np.concatenate([credit_sums(key, pairs, credit) for credit in credits], axis=1)
    estimate = clustered_interval(sums, ratio_difference)
    return DifferenceResult(key, pairs.scorer, others.scorer, int(both.sum()), estimate, pairs.split)


def level_results(key: str, levels: Iterable[tuple[float, float, BenchmarkPairs]]) -> list[LevelResult]:
    """Compute the protocol's number at each noise level: σ in [0, 1], timestep, and the pairs scored there."""
    results = []
    for sigma, timestep, pairs in levels:
        estimate = clustered_accuracy(credit_sums(key, pairs, judge(key, pairs).credit))
        results.append(LevelResult(key, pairs.scorer, sigma, timestep, estimate))
    return results
