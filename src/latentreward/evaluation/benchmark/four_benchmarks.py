"""Mean accuracy over four benchmarks, the number that DiNa-LRM's ablations report (arXiv:2602.11146)."""

from collections.abc import Iterator

import numpy as np

from latentreward.evaluation.benchmark.published_numbers import AVERAGE, published_for
from latentreward.evaluation.benchmark.results import BenchmarkReport
from latentreward.metrics.bootstrap import Interval
from latentreward.reports.tables import Row

FOUR_BENCHMARKS = {
    "imagereward test": "imagereward/micro",
    "hpdv2 test": "hpdv2/micro",
    "hpdv3 test": "hpdv3",
    "genai_bench_tiger test": "genai_bench_tiger/no_tie",
}
"""Data set and split → key of the protocol whose accuracy is averaged."""


def add_averages(report: BenchmarkReport) -> None:
    """Add the mean accuracy of every scorer that was evaluated on all four benchmarks, and published ones beside it."""
    report.averages += _averages(report)
    if report.averages:
        report.published += published_for((AVERAGE,))


def _averages(report: BenchmarkReport) -> Iterator[Row]:
    """Yield unweighted means of four accuracies.

    Intervals assume that the four accuracies are independent: the squared distances of their ends from the accuracies
    are added.
    """
    for scorer in report.scorers:
        found = [
            row["estimate"]
            for row in report.protocols
            if row["scorer"] == scorer and FOUR_BENCHMARKS.get(row["benchmark"]) == row["protocol"]
        ]
        if len(found) == len(FOUR_BENCHMARKS):
            values, lows, highs = np.array([one[:3] for one in found]).T
            groups = min((one.groups for one in found if one.groups is not None), default=None)
            value = values.mean()
            below, above = (np.linalg.norm(ends - values) / len(found) for ends in (lows, highs))
            estimate = Interval(float(value), float(value - below), float(value + above), groups)
            yield {"scorer": scorer, "estimate": estimate}
