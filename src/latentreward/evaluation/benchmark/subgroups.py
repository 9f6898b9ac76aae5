"""A protocol's number over parts of its pairs, at each noise level, and of one scorer against another."""

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
from latentreward.metrics.bootstrap import clustered_interval, ratio_difference

Judged = tuple[BenchmarkPairs, Judgement]


def subgroup_results(
    key: str,
    pairs: BenchmarkPairs,
    judgement: Judgement,
    columns: Sequence[str] = SUBGROUP_COLUMNS,
    least: int = 1,
) -> list[SubgroupResult]:
    """The number over the pairs of each value of each column, larger sub-groups first.

    Args:
        key: Protocol.
        pairs: Scores.
        judgement: What :func:`~latentreward.evaluation.benchmark.protocols.judge` gave for all pairs.
        columns: Columns to go by; those that the pairs lack are passed over.
        least: Least number of pairs that count.
    """
    results = []
    for column in (name for name in columns if name in pairs.columns):
        found = [_subgroup(key, pairs, judgement, column, *item) for item in _members(pairs.columns[column]).items()]
        results += sorted((item for item in found if item.pairs >= least), key=lambda item: (-item.pairs, item.value))
    return results


def _members(values: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Rows of each value; a value of several lines counts for each."""
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
    estimate = clustered_interval(credit_sums(key, pairs, credit))
    number = int((~np.isnan(credit)).sum())
    return SubgroupResult(key, pairs.scorer, column, value, number, estimate, pairs.split)


def paired_difference(key: str, first: Judged, second: Judged) -> DifferenceResult:
    """One scorer against another on the pairs that count for both; its interval is that of the difference.

    Args:
        key: Protocol.
        first: One scorer's pairs and judgement.
        second: The other's, on the same pairs.

    Raises:
        InputError: If the pairs are others.
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
    """The number at each noise level.

    Args:
        key: Protocol.
        levels: σ in [0, 1], timestep, and pairs scored at that level.
    """
    results = []
    for sigma, timestep, pairs in levels:
        estimate = clustered_interval(credit_sums(key, pairs, judge(key, pairs).credit))
        results.append(LevelResult(key, pairs.scorer, sigma, timestep, estimate))
    return results
