"""``latentreward score-pairs``: write a table with scores of both images of every pair, for filtering."""

from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.core.settings.functions import run_function
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import PartFiles
from latentreward.data import PairReader, count_text
from latentreward.reward import Scorer
from latentreward.reward.scorers.pair_scoring import PairScoring, require_images


def score_pairs(
    output: Path,
    reader: PairReader,
    scorers: list[Scorer],
    *,
    flush_every: int = 512,
    **options: Any,
) -> None:
    """Score both images of every pair and write a table, by which FilteredReader filters pairs.

    Finished parts of the table are kept in ``OUTPUT.parts/``. The same command resumes a killed run, and refuses other
    pairs, pictures, scorers, model files or functions. An image that recurs with the same prompt is scored once. An
    image that cannot be read gets NaN scores, and the reason in ``problem_a`` or ``problem_b``. Devices and batch sizes
    are settings of the scorers.

    Args:
        output: File to write, .parquet or .csv.
        reader: Reader of the pairs.
        scorers: Scorers of the images, e.g. latentreward.reward.CLIPScorer.
        flush_every: Pairs per part of the table: a killed process loses at most one part.
        options: See :class:`~latentreward.reward.scorers.pair_scoring.PairScoring`.
    """
    scoring = PairScoring(reader, scorers, **options)
    with PartFiles(output, scoring.spec(), len(reader)) as files:
        if files.finished():
            print(f"{output} is complete already: {len(reader)} pairs")
            return
        missing = files.missing(flush_every)
        if missing:
            if scoring.image_scorers:
                require_images("reader", reader, len(reader))
            scoring.prepare()
            for rows, table in files.read():
                scoring.recall(rows, table)
        pairs = sum(map(len, missing))
        with Progress("score-pairs", files.rows, "pairs", files.rows - pairs) as progress:
            for rows, table in scoring.tables(missing):
                files.write(rows, table)
                progress.add(len(rows))
        problems, without = Counter[str](), Counter[str]()
        for _, table in files.read():
            for side in ("a", "b"):
                problems.update(filter(None, table.column(f"problem_{side}").to_pylist()))
            for name in chain.from_iterable(scorer.columns for scorer in scorers):
                first, second = (np.isnan(table.column(f"{name}_{side}").to_numpy()) for side in ("a", "b"))
                without[name] += int((first | second).sum())
        files.finish()
    print(f"{output}: {len(reader)} pairs, {pairs} of them scored now")
    print(f"unreadable images: {count_text(problems)}; pairs without a score: {count_text(+without)}")


run = partial(run_function, score_pairs)
