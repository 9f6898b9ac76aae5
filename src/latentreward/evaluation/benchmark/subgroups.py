"""A protocol's number on sub-groups of the pairs, at each noise level, and as difference of two scorers."""

from collections.abc import Iterable

import numpy as np

from latentreward.errors import InputError
from latentreward.evaluation.benchmark.columns import SUBGROUP_COLUMNS
from latentreward.evaluation.benchmark.protocols import Judgement, judge
from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.metrics.bootstrap import clustered_accuracy, clustered_interval, ratio_difference
from latentreward.reports.tables import Row


def subgroup_results(judgement: Judgement) -> list[Row]:
    """Compute the protocol's number on each sub-group with counted pairs, larger sub-groups of a column first.

    A pair whose value of a column has several lines belongs to the sub-group of each line.
    """
    results, pairs = list[Row](), judgement.pairs
    for column in SUBGROUP_COLUMNS:
        members: dict[str, list[int]] = {}
        for row, value in enumerate(pairs.columns.get(column, ())):
            for line in value.split("\n") if value else ():
                members.setdefault(line, []).append(row)
        found = []
        for value, rows in members.items():
            credit = np.full(len(judgement.credit), np.nan)
            credit[rows] = judgement.credit[rows]
            if number := int((~np.isnan(credit)).sum()):
                group = {"protocol": judgement.protocol, "scorer": pairs.scorer, "column": column, "value": value}
                estimate = clustered_accuracy(judgement.sums(credit))
                found.append(
                    {**group, "pairs": number, "estimate": estimate, "split": pairs.split, "benchmark": pairs.benchmark}
                )
        results += sorted(found, key=lambda row: (-row["pairs"], row["value"]))
    return results


def paired_difference(first: Judgement, second: Judgement) -> Row:
    """Compute the difference of two scorers on the pairs that count for both, with the interval of the difference.

    Raises:
        InputError: If the two scorers scored different pairs.
    """
    pairs, others = first.pairs, second.pairs
    if pairs.pair_ids != others.pair_ids:
        raise InputError(f"{pairs.scorer} and {others.scorer} scored other pairs; score both on the same split")
    both = ~np.isnan(first.credit) & ~np.isnan(second.credit)
    sums = np.concatenate([first.sums(np.where(both, item.credit, np.nan)) for item in (first, second)], axis=1)
    estimate = clustered_interval(sums, ratio_difference)
    compared = {"protocol": first.protocol, "first": pairs.scorer, "second": others.scorer, "pairs": int(both.sum())}
    return compared | {"estimate": estimate, "split": pairs.split, "benchmark": pairs.benchmark}


def level_results(key: str, levels: Iterable[tuple[float, float, BenchmarkPairs]]) -> list[Row]:
    """Compute the protocol's number at each noise level: σ in [0, 1], timestep, and the pairs scored there."""
    results: list[Row] = []
    for sigma, timestep, pairs in levels:
        judgement = judge(key, pairs)
        estimate = clustered_accuracy(judgement.sums(judgement.credit))
        level = {"protocol": key, "scorer": pairs.scorer, "sigma": sigma, "timestep": timestep}
        results.append(level | {"estimate": estimate, "benchmark": pairs.benchmark})
    return results
