"""Measure the statistics of reports on random scores; prints a Markdown table.

    python benchmarks/report_statistics.py [--groups 1000 10000 100000] [--scorers 4]

``benchmark``: all numbers of a report on two pairs per prompt, each prompt a group, scored by several scorers:
protocols, sub-groups, differences, calibration, agreement and correlations. ``evaluate-policy``: all numbers of a
comparison of two policies by as many scores, on one picture per prompt, prompts in five categories. Images, tables and
pages are left out. CPU seconds of this process, one thread.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measuring import Goal, table
from typing_extensions import override

from latentreward.apps.evaluation.benchmark.evaluate import BenchmarkScores, evaluate
from latentreward.apps.evaluation.benchmark.sets import PairsBenchmark
from latentreward.apps.evaluation.policy.statistics import ScoredPictures, compare, policy_scores
from latentreward.core.bootstrap import Interval
from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.data import PairReader
from latentreward.reward import Scorer
from latentreward.reward.scorers.tools import JudgedPicture

PER_GROUP = 2


class RandomPairs(PairReader):
    """Pairs with random labels and no images, ``PER_GROUP`` to a prompt."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self._labels = np.random.default_rng(0).choice([0.0, 0.5, 1.0], groups * PER_GROUP, p=[0.4, 0.2, 0.4])

    def __len__(self) -> int:
        return len(self._labels)

    @override
    def __getitem__(self, index: int) -> PreferencePair:
        prompt, name = f"prompt {index // PER_GROUP}", f"{index}"
        return PreferencePair(name, prompt, ImageRef(name + "a"), ImageRef(name + "b"), float(self._labels[index]))

    @override
    def labels(self) -> np.ndarray:
        return self._labels


class Named(Scorer):
    """Scorer of which only the name is used."""

    @override
    def identity(self) -> str:
        return f"CLIPScorer {self.name}"


def benchmark_scores(groups: int, scorers: int) -> BenchmarkScores:
    """Make the scores of a benchmark: normal, the better image's 0.5 higher in the mean."""
    reader = RandomPairs(groups)
    named = [Named(f"scorer{number}") for number in range(scorers)]
    names, tables = reader.pair_ids(), {}
    for number, scorer in enumerate(named):
        first, second = np.random.default_rng(number + 1).normal(size=(2, len(reader)))
        columns: dict[str, Any] = {"pair_id": names}
        for side, scores in (("a", first + reader.labels() - 0.5), ("b", second)):
            columns |= {f"image_{side}": [name + side for name in names], f"{scorer.name}_{side}": scores}
            columns |= {f"problem_{side}": pa.nulls(len(reader), pa.string())}
        tables["all", scorer.name] = SimpleNamespace(table=pa.table(columns))
    benchmark = PairsBenchmark(reader)
    benchmark.pairs("all")
    return BenchmarkScores(benchmark, named, tables)


def policies(groups: int, scores: int) -> list[ScoredPictures]:
    """Make the scored pictures of two policies."""
    pictures = tuple(JudgedPicture(n, 0, f"{n}.png", Path(), f"prompt {n}", f"kind {n % 5}") for n in range(groups))
    drawn = np.random.default_rng(0).normal(size=(2, scores, groups))
    return [
        ScoredPictures(f"policy{number}", pictures, {f"score{n}": values for n, values in enumerate(one)})
        for number, one in enumerate(drawn)
    ]


def policy_report(two: list[ScoredPictures]) -> list[Any]:
    """Compute all numbers of a comparison of two policies."""
    headlines = dict.fromkeys(two[0].scores, "mean")
    return [*(policy_scores(one, headlines) for one in two), compare(two[0], two[1], headlines)]


def intervals(found: Any) -> Iterator[Interval]:
    """Yield all intervals in results."""
    if isinstance(found, Interval):
        yield found
    elif dataclasses.is_dataclass(found):
        yield from (interval for value in vars(found).values() for interval in intervals(value))
    elif isinstance(found, dict):
        yield from intervals([*found.values()])
    elif isinstance(found, list | tuple):
        yield from (interval for value in found for interval in intervals(value))


def main() -> None:
    """Run the measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--scorers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for groups in options.groups:
        scores, two = benchmark_scores(groups, options.scorers), policies(groups, options.scorers)
        for name, report in (
            ("benchmark", partial(evaluate, [scores])),
            ("evaluate-policy", partial(policy_report, two)),
        ):
            began = time.process_time()
            numbers = len(list(intervals(report())))
            seconds = time.process_time() - began
            goal = Goal(seconds, most=60) if groups == 100_000 else ""
            rows.append([name, f"{groups:,}", numbers, f"{seconds:.1f}", f"{seconds / numbers:.2f}", goal])
    columns = ("report", "groups", "numbers with an interval", "CPU s", "CPU s per number", "goal of CPU s")
    table("Statistics of reports, one thread", columns, rows)


if __name__ == "__main__":
    main()
