"""Computation of everything that a report shows from the tables of scores."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from latentreward.evaluation.benchmark.base import Benchmark, Evaluation
from latentreward.evaluation.benchmark.calibration import calibration_result
from latentreward.evaluation.benchmark.disagreements import most_disputed
from latentreward.evaluation.benchmark.model_agreement import agreement_result, correlation_results
from latentreward.evaluation.benchmark.noise_columns import NoiseColumns
from latentreward.evaluation.benchmark.protocols import protocol_result, protocol_value
from latentreward.evaluation.benchmark.published_numbers import published_for
from latentreward.evaluation.benchmark.results import (
    BenchmarkPairs,
    BenchmarkReport,
    LevelResult,
    ProtocolResult,
)
from latentreward.evaluation.benchmark.scoring import data_counts, table_timesteps
from latentreward.evaluation.benchmark.subgroups import Judged, level_results, paired_difference, subgroup_results
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
Tables = Mapping[tuple[str, str], pa.Table]
"""(name of the split, name of the scorer) → table of scores."""
Result = TypeVar("Result", bound=Any)


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of one benchmark by all scorers.

    Attributes:
        benchmark: The benchmark.
        scorers: Scorers that scored its pairs.
        tables: Table of scores of each split and scorer.
    """

    benchmark: Benchmark
    scorers: Sequence[Scorer]
    tables: Tables

    def pairs(self, split: str, scorer: Scorer, column: str | None = None) -> BenchmarkPairs:
        """Return the pairs of a split with a scorer's scores.

        ``column`` selects another column of the scorer's table, e.g. that of one noise level; results still carry the
        scorer's name.
        """
        return self.benchmark.scored(split, self.tables[split, scorer.name], column or scorer.name, scorer=scorer.name)

    def judge(self, evaluation: Evaluation, scorer: Scorer, column: str | None = None) -> Judged:
        """Return the pairs of the evaluation's split and the protocol's judgement of each; see :meth:`pairs`."""
        splits = [evaluation.split, *([evaluation.fitting] if evaluation.fitting else [])]
        scored = {split: self.pairs(split, scorer, column) for split in splits}
        return scored[evaluation.split], evaluation.judge(scored)

    def name(self, split: str) -> str:
        """Return the name of data set and split in the report, e.g. ``hpdv3 test``."""
        return f"{self.benchmark.name} {split}"


def evaluate(scores: BenchmarkScores, shown: int) -> BenchmarkReport:
    """Compute the report on one benchmark."""
    report = BenchmarkReport(
        scorers={scorer.name: public_identity(scorer) for scorer in scores.scorers},
        protocols=tuple(
            _protocol(scores, evaluation, scorer)
            for evaluation in scores.benchmark.evaluations
            for scorer in scores.scorers
        ),
        published=published_for(scores.benchmark.protocols),
        data={
            scores.name(split): data_counts(scores.tables[split, scores.scorers[0].name], reader)
            for split, reader in scores.benchmark.readers().items()
        },
    )
    for evaluation in scores.benchmark.evaluations:
        if evaluation.protocol in LOOKED_INTO:
            report = merged([report, _look_into(scores, evaluation, shown)])
    return report


def merged(reports: Sequence[BenchmarkReport]) -> BenchmarkReport:
    """Merge several reports into one; repeated published numbers are kept once."""
    first, *others = reports
    for other in others:
        added = {
            name: {**value, **getattr(other, name)} if isinstance(value, dict) else (*value, *getattr(other, name))
            for name, value in vars(first).items()
        }
        first = BenchmarkReport(**{**added, "published": tuple(dict.fromkeys(added["published"]))})
    return first


def _protocol(scores: BenchmarkScores, evaluation: Evaluation, scorer: Scorer) -> ProtocolResult:
    result = protocol_result(evaluation.protocol, *scores.judge(evaluation, scorer))
    result = replace(result, benchmark=scores.name(evaluation.split))
    if not isinstance(scorer, NoiseColumns):
        return result
    if scorer.axis_columns:
        judged = {axis: scores.judge(evaluation, scorer, column) for axis, column in scorer.axis_columns.items()}
        axes = {axis: protocol_value(evaluation.protocol, *one) for axis, one in judged.items()}
        result = replace(result, details={**result.details, "axes": axes})
    if scorer.draws == 1:
        return result
    others = [scores.judge(evaluation, scorer, column) for column in scorer.draw_columns]
    values = [result.estimate.value, *(protocol_value(evaluation.protocol, *judged) for judged in others)]
    draws = {"values": values, "number": len(values), "mean": np.mean(values), "sd": np.std(values, ddof=1)}
    return replace(result, details={**result.details, "draws": draws})


def _look_into(scores: BenchmarkScores, evaluation: Evaluation, shown: int) -> BenchmarkReport:
    protocol, name = evaluation.protocol, scores.name(evaluation.split)
    judged = [scores.judge(evaluation, scorer) for scorer in scores.scorers]
    pairs = [one for one, _ in judged]
    agreement = [agreement_result(name, *both) for both in combinations(pairs, 2)]
    identities = {scorer.name: scorer.identity() for scorer in scores.scorers}
    return BenchmarkReport(
        scorers={},
        differences=_of(name, (paired_difference(protocol, *both) for both in combinations(judged, 2))),
        subgroups=_of(name, (result for one in judged for result in subgroup_results(protocol, *one))),
        levels=_of(name, _levels(scores, evaluation)),
        calibration=_of(name, (calibration_result(protocol, one) for one in pairs)),
        agreement=tuple(agreement),
        correlations=tuple(one for result in agreement for one in correlation_results(result, identities)),
        telling=tuple(most_disputed(name, pairs, shown)),
    )


def _of(name: str, results: Iterable[Result]) -> tuple[Result, ...]:
    """Set the name of data set and split on results."""
    return tuple(replace(result, benchmark=name) for result in results)


def _levels(scores: BenchmarkScores, evaluation: Evaluation) -> Iterator[LevelResult]:
    for scorer in scores.scorers:
        if isinstance(scorer, NoiseColumns) and scorer.levels:
            timesteps = table_timesteps(scores.tables[evaluation.split, scorer.name])
            columns = (scores.pairs(evaluation.split, scorer, column) for column in scorer.level_columns)
            levels: list[Any] = list(zip(scorer.levels, timesteps, columns, strict=True))
            yield from level_results(evaluation.protocol, levels)
