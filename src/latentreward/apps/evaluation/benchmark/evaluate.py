"""Computation of everything that a report shows from the tables of scores."""

import json
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import torch

from latentreward.apps.evaluation.benchmark.base import (
    AVERAGE,
    FOUR_BENCHMARKS,
    BenchmarkPairs,
    BenchmarkReport,
    Evaluation,
    published_for,
)
from latentreward.apps.evaluation.benchmark.pair_scores import TIMESTEPS, BenchmarkScores, NoiseColumns, data_counts
from latentreward.apps.evaluation.benchmark.protocols import Judgement, judge
from latentreward.core import bootstrap
from latentreward.core.reports.tables import Row
from latentreward.reward import PairCalibration
from latentreward.reward.metrics.calibration import bin_by_confidence, fit_temperature
from latentreward.reward.metrics.intervals import clustered_correlation, same_order
from latentreward.reward.scorers.fingerprints import public_identity

LOOKED_INTO = (
    "imagereward/micro",
    "hpdv2/macro",
    "hpdv3",
    "pickapic/strict",
    "genai_bench_tiger/no_tie",
    "genai_bench_cmu",
    "editreward_bench/pairs",
    "pairs/strict",
)
"""Protocols for which differences, sub-groups, noise levels and calibration are computed: one of each data set."""


def evaluate(scored: Sequence[BenchmarkScores]) -> BenchmarkReport:
    """Compute the report on scored benchmarks."""
    report = BenchmarkReport({scorer.name: public_identity(scorer) for scorer in scored[0].scorers})
    for scores in scored:
        evaluations = scores.benchmark.evaluations
        report.protocols += [scores.judge(one, scorer).result() for one in evaluations for scorer in scores.scorers]
        published = published_for(scores.benchmark.protocols)
        report.published += [number for number in published if number not in report.published]
        for split, reader in scores.benchmark.readers().items():
            table = scores.tables[split, scores.scorers[0].name].table
            report.data[f"{scores.benchmark.name} {split}"] = data_counts(table, reader)
        for evaluation in evaluations:
            if evaluation.protocol in LOOKED_INTO:
                _look_into(report, scores, evaluation)
    add_averages(report)
    return report


def _look_into(report: BenchmarkReport, scores: BenchmarkScores, evaluation: Evaluation) -> None:
    """Add to the report what is computed for one protocol of a data set only."""
    protocol = evaluation.protocol
    judged = [scores.judge(evaluation, scorer) for scorer in scores.scorers]
    pairs = [one.pairs for one in judged]
    report.differences += [paired_difference(*both) for both in combinations(judged, 2)]
    report.subgroups += [row for one in judged for row in subgroup_results(one)]
    for scorer in scores.scorers:
        if isinstance(scorer, NoiseColumns) and scorer.levels:
            timesteps = json.loads(scores.tables[evaluation.split, scorer.name].table.schema.metadata[TIMESTEPS])
            columns = (scores.pairs(evaluation.split, scorer, column) for column in scorer.level_columns)
            report.levels += level_results(protocol, zip(scorer.levels, timesteps, columns, strict=True))
    report.calibration += [calibration_result(protocol, one) for one in pairs]
    report.agreement += [agreement_result(*both) for both in combinations(pairs, 2)]


def subgroup_results(judgement: Judgement) -> list[Row]:
    """Compute the protocol's number on the pairs of each two models that have any, those with most pairs first."""
    values, found = np.array(judgement.pairs.columns.get("models", ()), dtype=object), list[Row]()
    for value in dict.fromkeys(value for value in values if value):
        credit = np.where(values == value, judgement.credit, np.nan)
        if number := int((~np.isnan(credit)).sum()):
            estimate = bootstrap.clustered_accuracy(judgement.sums(credit))
            group = {"column": "models", "value": value, "pairs": number, "estimate": estimate}
            found.append({**judgement.named(), **group})
    return sorted(found, key=lambda row: (-row["pairs"], row["value"]))


def paired_difference(first: Judgement, second: Judgement) -> Row:
    """Compute the difference of two scorers on the pairs that count for both, with the interval of the difference."""
    both = ~np.isnan(first.credit) & ~np.isnan(second.credit)
    sums = np.concatenate([first.sums(np.where(both, item.credit, np.nan)) for item in (first, second)], axis=1)
    return {
        "benchmark": first.pairs.benchmark,
        "protocol": first.protocol,
        "first": first.pairs.scorer,
        "second": second.pairs.scorer,
        "pairs": int(both.sum()),
        "estimate": bootstrap.clustered_interval(sums, bootstrap.ratio_difference),
    }


def level_results(key: str, levels: Iterable[tuple[float, float, BenchmarkPairs]]) -> list[Row]:
    """Compute the protocol's number at each noise level: σ in [0, 1], timestep, and the pairs scored there."""
    results: list[Row] = []
    for sigma, timestep, pairs in levels:
        judged = judge(key, pairs)
        estimate = bootstrap.clustered_accuracy(judged.sums(judged.credit))
        results.append({**judged.named(), "sigma": sigma, "timestep": timestep, "estimate": estimate})
    return results


BINS = 10


def calibration_result(key: str, pairs: BenchmarkPairs) -> Row:
    """Compute the expected calibration error over all pairs with a label and two scores, ties included.

    The prompt groups are cut into two halves. The temperature for one half is fitted on the other half by maximum
    likelihood, so the error is measured on unseen prompts. Bins and error are those of
    :class:`~latentreward.reward.PairCalibration`. The interval resamples prompt groups and does not refit
    the temperatures; it is centred on the error, because resampling inflates the error. With finitely many pairs the
    error is positive even for a calibrated scorer.
    """
    known = ~(np.isnan(pairs.labels) | np.isnan(pairs.first) | np.isnan(pairs.second))
    gap, label = pairs.gap[known], pairs.labels[known]
    groups = pairs.group_codes[known]
    probability = torch.from_numpy(cross_fitted_probability(gap, label, groups))
    metric = PairCalibration(BINS)
    metric.update(probability, torch.from_numpy(label))
    index, confidence, outcome = bin_by_confidence(probability, torch.from_numpy(label), BINS)
    columns = [np.where(index.numpy() == b, (outcome - confidence).double().numpy(), 0) for b in range(BINS)]
    sums = bootstrap.group_sums(groups, np.ones(len(gap)), *columns)
    error = bootstrap.clustered_interval(sums, lambda sums: np.abs(sums[..., 1:]).sum(-1) / sums[..., 0], centred=True)
    curve = zip(*(values.tolist() for values in metric.curve()), strict=True)
    return {
        "benchmark": pairs.benchmark,
        "protocol": key,
        "scorer": pairs.scorer,
        "temperature": fit_temperature(gap, label),
        "error": error._replace(low=max(error.low, 0.0)),
        "curve": [(int(count), mean, share) for count, mean, share in curve if count],
    }


def cross_fitted_probability(gap: np.ndarray, label: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the ``(N,)`` probability that image a wins; each half of the groups uses the other half's temperature."""
    second_half, probability = bootstrap.two_folds(groups), np.full(len(gap), 0.5)
    for half in (False, True):
        rows = second_half == half
        temperature = fit_temperature(gap[~rows], label[~rows])
        probability[rows] = 0.5 + 0.5 * np.tanh(gap[rows] / (2 * temperature))
    return probability


def agreement_result(pairs: BenchmarkPairs, others: BenchmarkPairs) -> Row:
    """Compute the share of pairs with score gaps of the same sign, and the correlations of the scores of all images.

    Labels are not used. If the pairs have image keys, an image that recurs with the same prompt counts once in the
    correlations, in the prompt group of the first pair that contains it.
    """
    alike = same_order(pairs.gap, others.gap)
    rows = np.arange(2 * len(pairs.pair_ids))
    if pairs.first_images:
        seen: dict[tuple[str, str], int] = {}
        images = zip(pairs.first_images + pairs.second_images, pairs.prompts * 2, strict=True)
        for row, image in enumerate(images):
            seen.setdefault(image, row)
        rows = np.fromiter(seen.values(), dtype=np.int64)
    x, y = (np.concatenate([item.first, item.second])[rows] for item in (pairs, others))
    groups = np.tile(pairs.group_codes, 2)[rows]
    return {
        "benchmark": pairs.benchmark,
        "first": pairs.scorer,
        "second": others.scorer,
        "pairs": int((~np.isnan(alike)).sum()),
        "pair": bootstrap.clustered_mean(alike, pairs.group_codes),
        "spearman": clustered_correlation(x, y, groups, "spearman"),
        "pearson": clustered_correlation(x, y, groups, "pearson"),
    }


def add_averages(report: BenchmarkReport) -> None:
    """Add the mean accuracy of every scorer that was evaluated on all four benchmarks, and published ones beside it.

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
            estimate = bootstrap.Interval(float(value), float(value - below), float(value + above), groups)
            report.averages.append({"scorer": scorer, "estimate": estimate})
    if report.averages:
        report.published += published_for((AVERAGE,))
