"""Mean accuracy over four benchmarks, the number that DiNa-LRM's ablations report (arXiv:2602.11146)."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from latentreward.evaluation.benchmark.published_numbers import DINA, DINA_CLEAN, DINA_CONSTANT, DINA_FROZEN
from latentreward.evaluation.benchmark.results import AverageResult, BenchmarkReport, PublishedNumber
from latentreward.metrics.bootstrap import Interval

FOUR_BENCHMARKS = {
    "imagereward test": "imagereward/micro",
    "hpdv2 test": "hpdv2/micro",
    "hpdv3 test": "hpdv3",
    "genai_bench_tiger test": "genai_bench_tiger/no_tie",
}
"""Data set and split → key of the protocol whose accuracy is averaged."""
KEY = "four_benchmarks"
"""Key of published averages, in the place of a protocol's key."""
PUBLISHED_AVERAGES = tuple(
    PublishedNumber(KEY, model, value, DINA)
    for model, value in {
        "DiNa-LRM": 0.7149,
        "DiNa-LRM (ensemble)": 0.7248,
        "LRM-SDXL": 0.6173,
        "HPSv3": 0.7484,
        "MPS": 0.7051,
        "UnifiedReward": 0.7281,
        DINA_CONSTANT: 0.7068,
        DINA_CLEAN: 0.6493,
        DINA_FROZEN: 0.7027,
    }.items()
)


def with_averages(report: BenchmarkReport) -> BenchmarkReport:
    """Add the mean accuracy of every scorer that was evaluated on all four benchmarks; otherwise return ``report``."""
    averages = tuple(_averages(report))
    if not averages:
        return report
    return replace(report, averages=averages, published=(*report.published, *PUBLISHED_AVERAGES))


def _averages(report: BenchmarkReport) -> Iterator[AverageResult]:
    """Yield unweighted means of four accuracies.

    Intervals assume that the four accuracies are independent: the squared distances of their ends from the accuracies
    are added.
    """
    for scorer in report.scorers:
        found = [
            result.estimate
            for result in report.protocols
            if result.scorer == scorer and FOUR_BENCHMARKS.get(result.benchmark) == result.protocol
        ]
        if len(found) == len(FOUR_BENCHMARKS):
            values, lows, highs = np.array([one[:3] for one in found]).T
            groups = min((one.groups for one in found if one.groups is not None), default=None)
            value = values.mean()
            below, above = (np.linalg.norm(ends - values) / len(found) for ends in (lows, highs))
            yield AverageResult(scorer, Interval(float(value), float(value - below), float(value + above), groups))
