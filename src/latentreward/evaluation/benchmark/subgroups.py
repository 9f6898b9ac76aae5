"""A protocol's number on sub-groups of the pairs, at each noise level, and as difference of two scorers."""

from collections.abc import Iterable, Sequence

import numpy as np

from latentreward.errors import InputError
from latentreward.evaluation.benchmark.columns import SUBGROUP_COLUMNS
from latentreward.evaluation.benchmark.protocols import Judgement, credit_sums, judge
from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.metrics.bootstrap import clustered_accuracy, clustered_interval, ratio_difference
from latentreward.reports.tables import Row

Judged = tuple[BenchmarkPairs, Judgement]


def subgroup_results(
    key: str,
    pairs: BenchmarkPairs,
    judgement: Judgement,
    columns: Sequence[str] = SUBGROUP_COLUMNS,
    least: int = 1,
) -> list[Row]:
    """Compute the protocol's number on each sub-group, larger sub-groups of a column first.

    Sub-groups with fewer than ``least`` counted pairs, and columns that the pairs lack, are left out.
    """
    results: list[Row] = []
    for column in (name for name in columns if name in pairs.columns):
        found = [
            {
                "protocol": key,
                "scorer": pairs.scorer,
                "column": column,
                "value": value,
                **_on(rows, key, pairs, judgement),
            }
            for value, rows in _members(pairs.columns[column]).items()
        ]
        kept = (row for row in found if row["pairs"] >= least)
        results += sorted(kept, key=lambda row: (-row["pairs"], row["value"]))
    return results


def _members(values: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Return the rows of each value; a row whose value has several lines belongs to each line."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        for line in value.split("\n") if value else ():
            rows.setdefault(line, []).append(row)
    return {value: np.array(members) for value, members in rows.items()}


def _on(rows: np.ndarray, key: str, pairs: BenchmarkPairs, judgement: Judgement) -> Row:
    """Compute the protocol's number on some rows of the pairs."""
    credit = np.full(len(judgement.credit), np.nan)
    credit[rows] = judgement.credit[rows]
    estimate = clustered_accuracy(credit_sums(key, pairs, credit))
    number = int((~np.isnan(credit)).sum())
    return {"pairs": number, "estimate": estimate, "split": pairs.split, "benchmark": pairs.benchmark}


def paired_difference(key: str, first: Judged, second: Judged) -> Row:
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
    compared = {"protocol": key, "first": pairs.scorer, "second": others.scorer, "pairs": int(both.sum())}
    return compared | {"estimate": estimate, "split": pairs.split, "benchmark": pairs.benchmark}


def level_results(key: str, levels: Iterable[tuple[float, float, BenchmarkPairs]]) -> list[Row]:
    """Compute the protocol's number at each noise level: σ in [0, 1], timestep, and the pairs scored there."""
    results: list[Row] = []
    for sigma, timestep, pairs in levels:
        estimate = clustered_accuracy(credit_sums(key, pairs, judge(key, pairs).credit))
        level = {"protocol": key, "scorer": pairs.scorer, "sigma": sigma, "timestep": timestep}
        results.append(level | {"estimate": estimate, "benchmark": pairs.benchmark})
    return results
