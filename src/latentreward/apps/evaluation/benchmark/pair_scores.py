"""Scoring of the pairs of all splits into one table per split and scorer.

A stopped run resumes, and finished tables are reused.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentreward.apps.evaluation.benchmark.base import Benchmark, Evaluation
from latentreward.apps.evaluation.benchmark.protocols import Judgement, judge
from latentreward.apps.evaluation.benchmark.results import BenchmarkPairs
from latentreward.apps.evaluation.benchmark.sections import NoiseColumns
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import PartFiles
from latentreward.data import PairReader
from latentreward.reward import ImageScorer, Scorer
from latentreward.reward.scorers.pair_scoring import PairScoring, require_images

TIMESTEPS = b"timesteps"
"""Key of a table's metadata with the timesteps of a :class:`NoiseColumns` scorer's noise levels."""


@dataclass
class SplitScores:
    """Table with the scores of one split by one scorer.

    The constructor decodes no image and loads no model, but refuses an existing table that was made with other files of
    the scorer, or with other pairs, labels, prompts or images. Of images names and file sizes are compared, see
    :attr:`PairReader.image_digest`: delete the table if a few of millions were replaced.

    Attributes:
        seconds: Seconds that this process spent, by model and on reading.
    """

    folder: Path  # folder of the split's tables, one per scorer
    reader: PairReader  # reader of the split
    scorer: Scorer  # scorer of the pairs
    # Number of pairs to score at the start of the split; None scores all. A later run without a limit keeps the scores
    # and adds those of the other pairs.
    limit: int | None
    flush_every: int  # pairs per part of the table; a killed process loses at most one part
    decode_threads: int  # threads that decode images ahead of the scorer

    def __post_init__(self) -> None:
        self._scoring = PairScoring(self.reader, [self.scorer], self.decode_threads)
        self.seconds: Mapping[str, float] = self._scoring.seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        output = self.folder / f"{self.scorer.name}.parquet"
        self._files = PartFiles(output, self._scoring.spec(), len(self.reader))
        self.rows = len(self.reader) if self.limit is None else min(self.limit, len(self.reader))
        with self._files as files:
            self.missing = sum(map(len, self._missing(files)))

    def complete(self, progress: Callable[[int], None]) -> None:
        """Score the missing pairs; call the scorer's ``prepare`` first.

        ``progress`` gets the number of newly scored pairs after each part.
        """
        with self._files as files:
            if files.finished():
                return
            for rows, table in files.read():
                self._scoring.recall(rows, table)
            for rows, table in self._scoring.tables(self._missing(files)):
                if isinstance(self.scorer, NoiseColumns):
                    table = table.replace_schema_metadata({TIMESTEPS: json.dumps(self.scorer.timesteps())})  # noqa: PLW2901
                files.write(rows, table)
                progress(len(rows))
            if not files.missing(self.flush_every):
                files.finish()

    @cached_property
    def table(self) -> pa.Table:
        """Rows of the table up to the limit; call :meth:`complete` first."""
        if self._files.finished():
            return pq.read_table(self._files.output.absolute()).slice(0, self.rows)
        return pa.concat_tables(table for _, table in self._files.read()).slice(0, self.rows)

    def _missing(self, files: PartFiles) -> list[range]:
        if files.finished():
            return []
        runs = files.missing(self.flush_every)
        return [range(rows.start, min(rows.stop, self.rows)) for rows in runs if rows.start < self.rows]


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of one benchmark by all scorers."""

    benchmark: Benchmark
    scorers: Sequence[Scorer]  # scorers of its pairs
    tables: Mapping[tuple[str, str], SplitScores]  # (split, name of the scorer) → table of scores

    def pairs(self, split: str, scorer: Scorer, column: str | None = None) -> BenchmarkPairs:
        """Return the pairs of a split with a scorer's scores.

        ``column`` selects another column of the scorer's table, e.g. that of one noise level; results still carry the
        scorer's name.
        """
        table = self.tables[split, scorer.name].table
        return self.benchmark.scored(split, table, column or scorer.name, scorer=scorer.name)

    def judge(self, evaluation: Evaluation, scorer: Scorer, column: str | None = None) -> Judgement:
        """Judge the pairs of the evaluation's split by its protocol; see :meth:`pairs`."""
        fitting = None if evaluation.fitting is None else self.pairs(evaluation.fitting, scorer, column)
        return judge(evaluation.protocol, self.pairs(evaluation.split, scorer, column), fitting)


def open_scores(
    folder: Path, benchmarks: Sequence[Benchmark], scorers: Sequence[Scorer], limit: int | None, **options: int
) -> list[BenchmarkScores]:
    """Open all data sets and tables in ``folder``, so that wrong settings are refused before any model is loaded.

    Benchmarks have distinct names, and so have scorers; ``limit`` and ``options`` are those of :class:`SplitScores`.

    Raises:
        InputError: If a split or its images cannot be read, or a table belongs to other pairs or another scorer.
    """
    opened = []
    for one in benchmarks:
        tables = {}
        for split, reader in one.readers().items():
            name = f"{one.name} {split}"
            require_images(name, reader, min(len(reader), limit or len(reader)))
            own = folder / (re.sub(r"[^\w.-]+", "_", name).strip(".") or "_")  # a name that every file system takes
            for scorer in scorers:
                tables[split, scorer.name] = SplitScores(own, reader, scorer, limit, **options)
        opened.append(BenchmarkScores(one, scorers, tables))
    return opened


def complete(scored: Sequence[BenchmarkScores]) -> Mapping[str, float]:
    """Score the pairs that are missing in the tables; all models needed for that are loaded first.

    The seconds that this process spent on scoring, by model, and on reading images are returned.
    """
    tables = {f"{one.benchmark.name} {' '.join(key)}": table for one in scored for key, table in one.tables.items()}
    for scorer in {table.scorer.name: table.scorer for table in tables.values() if table.missing}.values():
        if isinstance(scorer, ImageScorer):
            scorer.prepare()
    for name, table in tables.items():
        with Progress(name, table.missing, "pairs") as progress:
            table.complete(progress.add)
    seconds: dict[str, float] = {}
    for name, spent in chain.from_iterable(table.seconds.items() for table in tables.values()):
        seconds[name] = seconds.get(name, 0.0) + spent
    return seconds


def data_counts(table: pa.Table, reader: PairReader) -> dict[str, Any]:
    """Count a split's pairs, prompts and images, and the images and rows that were left out by reason."""
    images, unread = ([table.column(f"{kind}_{side}").to_pylist() for side in "ab"] for kind in ("image", "problem"))
    reasons = zip(chain(*images), chain(*unread), strict=True)
    problems = {image: reason for image, reason in reasons if reason is not None}
    return {
        "pairs": table.num_rows,
        "pairs_in_file": len(reader),
        "prompts": len(set(reader.prompts()[: table.num_rows])),
        "images": len(set(chain(*images))),
        "unreadable_images": dict(sorted(Counter(problems.values()).items())),
        "pairs_without_an_image": sum(any(pair) for pair in zip(*unread, strict=True)),
        "rows_left_out_by_the_reader": dict(sorted(reader.skipped.items())),
        "remarks_of_the_reader": dict(sorted(reader.remarks.items())),
    }
