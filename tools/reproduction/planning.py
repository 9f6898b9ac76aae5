"""Plan of a budget: which row's next seed promises most decisions per second of processor time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from statistics import NormalDist

from tools.reproduction.results import Result, read_results, sample_of
from tools.reproduction.rows import LEAST_SEEDS, MOST_SEEDS, WHOLE, Row
from tools.reproduction.tasks import Task
from tools.reproduction.verdicts import Sample, judge


@dataclass(frozen=True)
class Choice:
    """Seed that a row may have next."""

    row: Row
    seed: int
    seconds: float  # expected processor time of what has not run
    rate: float  # expected decisions of claims per second


@dataclass
class Planner:
    """Planner of seeds."""

    rows: Sequence[Row]
    output: Path  # folder of results
    done: Callable[[Task], bool]  # whether a task has run
    _open: dict[tuple[str, tuple[int, ...]], list[tuple[Sample, float]]] = field(default_factory=dict)

    def chosen(self, number: int, seconds: float) -> list[Choice]:
        """Choose up to ``number`` rows with the most promising next seeds that fit into the processor time together.

        Rows below their planned number of seeds come first.
        """
        found = {row.name: read_results(self.output, row) for row in self.rows}
        measured = [one for results in found.values() for one in results.values()]
        known = {key: spent for one in measured for key, spent in one.tasks.items()}
        choices = filter(None, (self._choice(row, found[row.name], known) for row in self.rows))
        best: list[Choice] = []
        for choice in sorted(choices, key=lambda one: -one.rate):
            if len(best) < number and choice.seconds <= seconds:
                best.append(choice)
                seconds -= choice.seconds
        return best

    def _choice(self, row: Row, results: Mapping[int, Result], known: Mapping[str, float]) -> Choice | None:
        """Plan a row's next seed; None if it has no open claim, or as many repetitions as there may be."""
        (seed,) = further_seeds(results, 1)
        costs = dict(zip(row.tasks(seed).values(), _costs(row, results, known), strict=True))
        seconds = sum(cost for task, cost in costs.items() if not self.done(task))
        if len(results) < row.seeds:
            return Choice(row, seed, seconds, float("inf"))
        if row.once:
            return None
        least = len([one for one in results if one >= WHOLE]) + any(one < WHOLE for one in results)
        rates = [
            sum(chance(sample, margin, number) for sample, margin in self._open_claims(row, results))
            / (seconds + (number - least - 1) * sum(costs.values()) + 1e-9)
            for number in range(max(least + 1, LEAST_SEEDS), MOST_SEEDS + 1)
        ]
        return Choice(row, seed, seconds, max(rates)) if any(rates) else None

    def _open_claims(self, row: Row, results: Mapping[int, Result]) -> list[tuple[Sample, float]]:
        """List the sample and the margin of each open claim."""
        key = row.name, tuple(results)
        if key not in self._open:
            samples = ((sample_of(one, results, row), row.metrics[one.higher.metric].margin) for one in row.claims)
            given = [(sample, margin.size) for sample, margin in samples if sample and margin]
            self._open[key] = [(sample, size) for sample, size in given if judge(sample, size).word == "open"]
        return self._open[key]


def _costs(row: Row, results: Mapping[int, Result], known: Mapping[str, float]) -> list[float]:
    """Return the expected processor time of each task of a seed, from the seeds that are measured."""
    seed = next(iter(results), None)
    tasks = row.tasks(0 if seed is None else seed)
    if seed is None:
        return [row.cpu_seconds / row.seeds / len(tasks)] * len(tasks)
    return [known.get(key[:16], 0.0) for key in tasks]


def further_seeds(results: Mapping[int, Result], number: int) -> list[int]:
    """Return the next seeds of a row, whole repetitions."""
    return [*islice((seed for seed in count(WHOLE) if seed not in results), number)]


def chance(sample: Sample, margin: float, number: int) -> float:
    """Estimate the probability that a claim is decided once it has so many whole repetitions.

    The mean of then is distributed around that of now as if the spread were known.
    """
    if sample.alike:
        return 0.0
    half, within, now = sample.half_width(number), margin - sample.half_width(number, sides=1), sample.counts
    mean = NormalDist(float(sample.means.mean()), sample.spread * (1 / now - 1 / number) ** 0.5)
    decided = mean.cdf(-half) + 1 - mean.cdf(half)
    least = min(half, within)  # beyond ``half`` the claim is decided already
    return decided + (mean.cdf(least) - mean.cdf(-least) if within > 0 else 0.0)
