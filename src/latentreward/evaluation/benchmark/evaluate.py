"""Computation of everything that a report shows from the tables of scores."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from latentreward.evaluation.benchmark.base import Evaluation
from latentreward.evaluation.benchmark.calibration import calibration_result
from latentreward.evaluation.benchmark.disagreements import most_disputed
from latentreward.evaluation.benchmark.four_benchmarks import add_averages
from latentreward.evaluation.benchmark.model_agreement import agreement_result, correlation_results
from latentreward.evaluation.benchmark.noise_columns import NoiseColumns
from latentreward.evaluation.benchmark.published_numbers import published_for
from latentreward.evaluation.benchmark.results import BenchmarkReport
from latentreward.evaluation.benchmark.scoring import BenchmarkScores, data_counts, table_timesteps
from latentreward.evaluation.benchmark.subgroups import level_results, paired_difference, subgroup_results
from latentreward.reports.tables import Row
from latentreward.scorers import Scorer
from latentreward.scorers.fingerprints import public_identity

LOOKED_INTO = (
    "imagereward/micro",
    "hpdv2/macro",
    "hpdv3",
    "pickapic/strict",
    "genai_bench_tiger/no_tie",
    "genai_bench_cmu",
    "pairs/strict",
)
"""Protocols for which differences, sub-groups, noise levels and calibration are computed: one of each data set."""


def evaluate(scored: Sequence[BenchmarkScores], shown: int) -> BenchmarkReport:
    """Compute the report on scored benchmarks, with at most ``shown`` pairs of each split in ``telling``."""
    report = BenchmarkReport({scorer.name: public_identity(scorer) for scorer in scored[0].scorers})
    for scores in scored:
        evaluations = scores.benchmark.evaluations
        report.protocols += [_protocol(scores, one, scorer) for one in evaluations for scorer in scores.scorers]
        published = published_for(scores.benchmark.protocols)
        report.published += [number for number in published if number not in report.published]
        for split, reader in scores.benchmark.readers().items():
            table = scores.tables[split, scores.scorers[0].name].table
            report.data[f"{scores.benchmark.name} {split}"] = data_counts(table, reader)
        for evaluation in evaluations:
            if evaluation.protocol in LOOKED_INTO:
                _look_into(report, scores, evaluation, shown)
    add_averages(report)
    return report


def _protocol(scores: BenchmarkScores, evaluation: Evaluation, scorer: Scorer) -> Row:
    """Compute a protocol's result; of a latent reward also the numbers of its axes and of other draws of noise."""
    result, details = scores.judge(evaluation, scorer).result(), dict[str, Any]()

    def value(column: str) -> float:
        return scores.judge(evaluation, scorer, column).value

    if isinstance(scorer, NoiseColumns) and scorer.axis_columns:
        details["axes"] = {axis: value(column) for axis, column in scorer.axis_columns.items()}
    if isinstance(scorer, NoiseColumns) and scorer.draws > 1:
        values = [result["estimate"].value, *map(value, scorer.draw_columns)]
        draws = {"values": values, "number": len(values), "mean": np.mean(values), "sd": np.std(values, ddof=1)}
        details["draws"] = draws
    return {**result, "details": {**result["details"], **details}}


def _look_into(report: BenchmarkReport, scores: BenchmarkScores, evaluation: Evaluation, shown: int) -> None:
    """Add to the report what is computed for one protocol of a data set only."""
    protocol = evaluation.protocol
    judged = [scores.judge(evaluation, scorer) for scorer in scores.scorers]
    pairs = [one.pairs for one in judged]
    identities = {scorer.name: scorer.identity() for scorer in scores.scorers}
    agreement = [agreement_result(*both) for both in combinations(pairs, 2)]
    report.differences += [paired_difference(*both) for both in combinations(judged, 2)]
    report.subgroups += [row for one in judged for row in subgroup_results(one)]
    for scorer in scores.scorers:
        if isinstance(scorer, NoiseColumns) and scorer.levels:
            timesteps = table_timesteps(scores.tables[evaluation.split, scorer.name].table)
            columns = (scores.pairs(evaluation.split, scorer, column) for column in scorer.level_columns)
            report.levels += level_results(protocol, zip(scorer.levels, timesteps, columns, strict=True))
    report.calibration += [calibration_result(protocol, one) for one in pairs]
    report.agreement += agreement
    report.correlations += [row for result in agreement for row in correlation_results(result, identities)]
    report.telling += most_disputed(pairs, shown)
