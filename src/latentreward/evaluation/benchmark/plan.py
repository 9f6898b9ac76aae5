"""Everything that a run has to score: all splits of all data sets through all models."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from latentreward.evaluation.benchmark.base import Benchmark
from latentreward.evaluation.benchmark.evaluate import BenchmarkScores
from latentreward.evaluation.benchmark.scoring import SplitScores, folder_name, require_images
from latentreward.scorers import ImageScorer, Scorer
from latentreward.storage.progress import Progress


class ScoringPlan:
    """Opens all data and all tables, so that a wrong folder or setting shows before any model is loaded.

    Args:
        folder: Where tables of scores lie.
        benchmarks: Data sets of different names.
        scorers: Models of different names.
        limit: Only the first so many pairs of each split.
        options: Further settings of :class:`~latentreward.evaluation.benchmark.scoring.SplitScores`.

    Raises:
        InputError: If a split or its images cannot be read, or a table belongs to something else.
    """

    def __init__(
        self,
        folder: Path,
        benchmarks: Sequence[Benchmark],
        scorers: Sequence[Scorer],
        limit: int | None = None,
        **options: int,
    ) -> None:
        self.benchmarks, self.scorers = benchmarks, scorers
        self._tables: dict[tuple[str, str, str], SplitScores] = {}
        for one in benchmarks:
            for split, reader in one.readers().items():
                name = f"{one.name} {split}"
                require_images(name, reader, min(len(reader), limit or len(reader)))
                for scorer in scorers:
                    table = SplitScores(folder / folder_name(name), reader, scorer, limit, **options)
                    self._tables[one.name, split, scorer.name] = table

    def complete(self) -> None:
        """Score what no table holds yet, after all the models that it takes were loaded."""
        wanted = {one.scorer.name: one.scorer for one in self._tables.values() if one.missing}
        for scorer in wanted.values():
            if isinstance(scorer, ImageScorer):
                scorer.prepare()
        for place, one in self._tables.items():
            with Progress(" ".join(place), one.missing, "pairs") as progress:
                one.complete(progress.add)

    def scores(self) -> list[BenchmarkScores]:
        """All scores by data set, after :meth:`complete`."""
        return [BenchmarkScores(one, self.scorers, self._of(one)) for one in self.benchmarks]

    def _of(self, benchmark: Benchmark) -> dict[tuple[str, str], pa.Table]:
        places = [place for place in self._tables if place[0] == benchmark.name]
        return {place[1:]: self._tables[place].table() for place in places}

    def seconds(self) -> dict[str, float]:
        """Time spent in this process, by model and for reading."""
        return dict(sum((one.seconds for one in self._tables.values()), Counter()))
