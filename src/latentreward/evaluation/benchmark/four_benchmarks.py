"""The mean of four benchmarks, by which DiNa-LRM's ablations are told apart (arXiv:2602.11146)."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from latentreward.evaluation.benchmark.published_numbers import DINA
from latentreward.evaluation.benchmark.results import AverageResult, BenchmarkReport, PublishedNumber
from latentreward.metrics.bootstrap import Interval

FOUR_BENCHMARKS = {
    "imagereward test": "imagereward/micro",
    "hpdv2 test": "hpdv2/micro",
    "hpdv3 test": "hpdv3",
    "genai_bench_tiger test": "genai_bench_tiger/no_tie",
}
"""Data set and split → protocol whose number is averaged."""
KEY = "four_benchmarks"
"""Stands for a protocol's key with published averages."""
PUBLISHED_AVERAGES = tuple(
    PublishedNumber(KEY, model, value, DINA)
    for model, value in {
        "DiNa-LRM": 0.7149,
        "DiNa-LRM, constant variance": 0.7068,
        "DiNa-LRM, trained at t = 0 alone": 0.6493,
        "DiNa-LRM, frozen backbone": 0.7027,
    }.items()
)


def with_averages(report: BenchmarkReport) -> BenchmarkReport:
    """The report with the mean of every model that has been through all four benchmarks."""
    averages = tuple(_averages(report))
    if not averages:
        return report
    return replace(report, averages=averages, published=(*report.published, *PUBLISHED_AVERAGES))


def _averages(report: BenchmarkReport) -> Iterator[AverageResult]:
    """Unweighted means of accuracies; intervals as if the four were independent, their widths added as squares."""
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
