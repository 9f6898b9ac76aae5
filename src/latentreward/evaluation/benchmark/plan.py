"""Plan of a benchmark run: the splits of all data sets, each scored by all models."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from latentreward.evaluation.benchmark.base import Benchmark
from latentreward.evaluation.benchmark.evaluate import BenchmarkScores
from latentreward.evaluation.benchmark.scoring import SplitScores, folder_name
from latentreward.scorers import ImageScorer, Scorer
from latentreward.scorers.pair_scoring import require_images
from latentreward.storage.progress import Progress


class ScoringPlan:
    """Tables of scores of all splits and scorers of a run.

    Constructing the plan opens all data sets and tables, so that wrong folders and settings are refused before any
    model is loaded.

    Args:
        folder: Folder of the tables of scores.
        benchmarks: Benchmarks with distinct names.
        scorers: Scorers with distinct names.
        limit: Number of pairs to score at the start of each split; None scores all.
        options: Further settings of :class:`~latentreward.evaluation.benchmark.scoring.SplitScores`.

    Raises:
        InputError: If a split or its images cannot be read, or a table belongs to other pairs or another scorer.
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
        """Score the pairs that are missing in the tables; all models needed for that are loaded first."""
        wanted = {one.scorer.name: one.scorer for one in self._tables.values() if one.missing}
        for scorer in wanted.values():
            if isinstance(scorer, ImageScorer):
                scorer.prepare()
        for key, one in self._tables.items():
            with Progress(" ".join(key), one.missing, "pairs") as progress:
                one.complete(progress.add)

    def scores(self) -> list[BenchmarkScores]:
        """Return the scores of each benchmark; call :meth:`complete` first."""
        return [BenchmarkScores(one, self.scorers, self._of(one)) for one in self.benchmarks]

    def _of(self, benchmark: Benchmark) -> dict[tuple[str, str], pa.Table]:
        keys = [key for key in self._tables if key[0] == benchmark.name]
        return {key[1:]: self._tables[key].table() for key in keys}

    def seconds(self) -> dict[str, float]:
        """Return the seconds that this process spent on scoring, by model, and on reading images."""
        return dict(sum((one.seconds for one in self._tables.values()), Counter()))
