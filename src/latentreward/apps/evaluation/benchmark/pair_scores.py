"""Scoring of the pairs of all splits into one table per split and scorer.

A stopped run resumes, and finished tables are reused.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from latentreward.apps.evaluation.benchmark.base import Benchmark, BenchmarkPairs, Evaluation
from latentreward.apps.evaluation.benchmark.protocols import Judgement, judge
from latentreward.core.errors import InputError
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import PartFiles
from latentreward.data import PairReader
from latentreward.reward import ImageScorer, RewardModelScorer, Scorer, ScoringNoise
from latentreward.reward.scorers.pair_scoring import PairScoring, require_images

TIMESTEPS = b"timesteps"
"""Key of a table's metadata with the timesteps of a :class:`NoiseColumns` scorer's noise levels."""


class NoiseColumns(ImageScorer):
    """Scorer with several columns: a latent reward's own score, and one per noise level.

    A noise level is scored with the seeds of the reward's own noise. Images are encoded once for all columns.
    """

    def __init__(self, scorer: RewardModelScorer, levels: Sequence[float]) -> None:
        super().__init__(scorer.name, scorer.batch_size)
        if len(set(levels)) < len(levels):
            raise InputError(f"levels={list(levels)} holds a level twice; leave one")
        self.scorer, self.levels = scorer, tuple(levels)
        for level in levels:
            ScoringNoise(sigmas=(level,))
        self.level_columns = tuple(f"{self.name} sigma {level:g}" for level in levels)

    @property
    def columns(self) -> tuple[str, ...]:
        """Name of the reward's own score, then :attr:`level_columns`."""
        return self.name, *self.level_columns

    def identity(self) -> str:
        return f"{self.scorer.identity()}, levels {list(self.levels)}"

    def prepare(self) -> None:
        self.scorer.prepare()

    def timesteps(self) -> list[float]:
        """Return the timestep of the model's noise process for each noise level."""
        return self.scorer.model.backbone.noise_process.timesteps_at(torch.tensor(self.levels)).tolist()

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """Score B images: ``(B, K)`` for K columns, or ``(B,)`` for one; see :meth:`ImageScorer.score`."""
        own = self.scorer.noise or self.scorer.model.noise
        noises = [own, *(replace(own, sigmas=(level,), timesteps=()) for level in self.levels)]
        scores = self.scorer.score_levels(prompts, images, noises)
        return scores if self.levels else scores[:, 0]


@dataclass
class SplitScores:
    """Table with the scores of one split by one scorer.

    The constructor decodes no image and loads no model, but refuses an existing table that was made with other files of
    the scorer, or with other pairs, labels, prompts or images. Of images names and file sizes are compared, see
    :attr:`PairReader.image_digest`: delete the table if a few of millions were replaced.
    """

    folder: Path  # folder of the split's tables, one per scorer
    reader: PairReader  # reader of the split
    scorer: Scorer  # scorer of the pairs
    # Number of pairs to score at the start of the split; None scores all. A later run without a limit keeps the scores
    # and adds those of the other pairs.
    limit: int | None
    flush_every: int  # pairs per part of the table; a killed process loses at most one part

    def __post_init__(self) -> None:
        self._scoring = PairScoring(self.reader, [self.scorer])
        self.folder.mkdir(parents=True, exist_ok=True)
        output = self.folder / f"{self.scorer.name}.parquet"
        self._files = PartFiles(output, self._scoring.spec(), len(self.reader))
        self.rows = len(self.reader) if self.limit is None else min(self.limit, len(self.reader))
        with self._files as files:
            self.missing = sum(map(len, self._missing(files)))

    def complete(self, progress: Callable[[int], None]) -> None:
        """Score the missing pairs, and tell ``progress`` their number after each part; prepare the scorer first."""
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
        runs = [] if files.finished() else files.missing(self.flush_every)
        return [range(rows.start, min(rows.stop, self.rows)) for rows in runs if rows.start < self.rows]


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of one benchmark by all scorers."""

    benchmark: Benchmark
    scorers: Sequence[Scorer]  # scorers of its pairs
    tables: Mapping[tuple[str, str], SplitScores]  # (split, name of the scorer) → table of scores

    def pairs(self, split: str, scorer: Scorer, column: str | None = None) -> BenchmarkPairs:
        """Return the pairs of a split with a scorer's scores, under the scorer's name.

        ``column`` selects another column of the scorer's table, e.g. that of one noise level.
        """
        table = self.tables[split, scorer.name].table
        return self.benchmark.scored(split, table, column or scorer.name, scorer=scorer.name)

    def judge(self, evaluation: Evaluation, scorer: Scorer) -> Judgement:
        """Judge the pairs of the evaluation's split by its protocol; see :meth:`pairs`."""
        fitting = None if evaluation.fitting is None else self.pairs(evaluation.fitting, scorer)
        return judge(evaluation.protocol, self.pairs(evaluation.split, scorer), fitting)


def open_scores(
    folder: Path, benchmarks: Sequence[Benchmark], scorers: Sequence[Scorer], limit: int | None, flush_every: int
) -> list[BenchmarkScores]:
    """Open all data sets and tables in ``folder``, so that wrong settings are refused before any model is loaded.

    Benchmarks have distinct names, and so have scorers; ``limit`` and ``flush_every`` are those of
    :class:`SplitScores`.
    """
    opened = []
    for one in benchmarks:
        tables = {}
        for split, reader in one.readers().items():
            name = f"{one.name} {split}"
            require_images(name, reader, min(len(reader), limit or len(reader)))
            own = folder / (re.sub(r"[^\w.-]+", "_", name).strip(".") or "_")  # a name that every file system takes
            for scorer in scorers:
                tables[split, scorer.name] = SplitScores(own, reader, scorer, limit, flush_every)
        opened.append(BenchmarkScores(one, scorers, tables))
    return opened


def complete(scored: Sequence[BenchmarkScores]) -> None:
    """Score the pairs that are missing in the tables; all models needed for that are loaded first."""
    tables = {f"{one.benchmark.name} {' '.join(key)}": table for one in scored for key, table in one.tables.items()}
    for scorer in {table.scorer.name: table.scorer for table in tables.values() if table.missing}.values():
        if isinstance(scorer, ImageScorer):
            scorer.prepare()
    for name, table in tables.items():
        with Progress(name, table.missing, "pairs") as progress:
            table.complete(progress.add)


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
