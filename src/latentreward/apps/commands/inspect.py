"""``latentreward inspect``: print what a data set holds, before anything is trained on it."""

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

from latentreward.contracts import PathText
from latentreward.data.buckets import MIN_PIXELS, PUBLISHED_BUCKETS, sort_buckets
from latentreward.data.format_detection import choose_splits, other_formats, recognise
from latentreward.data.inspection.counts import ImageCensus, SplitContents, find_leakage, inspect_reader, inspect_scores
from latentreward.data.inspection.report import Report
from latentreward.data.readers import PairReader
from latentreward.data.score_table import ScoreTable
from latentreward.errors import InputError, printable
from latentreward.settings.functions import run_function
from latentreward.storage.durable import write_file


def inspect(
    data: PathText | None = None,
    reader: PairReader | list[PairReader] | None = None,
    *,
    splits: str | None = None,
    limit: int | None = None,
    decode: bool = False,
    hash_images: bool = True,
    buckets: list[tuple[int, int]] | None = None,
    scores: Path | None = None,
    output: Path | None = None,
) -> None:
    """Print counts of rows, labels, prompts, image sizes, rows left out by reason, and overlap between splits.

    The format of DATA and its splits are detected. Rows that break a rule of the format are left out and counted.
    Ctrl-C and SIGTERM print the counts so far.

    Args:
        data: Folder of a data set, or one of its files.
        reader: One or several readers to inspect, instead of DATA.
        splits: Splits of DATA to read, e.g. ``train,test``; all by default.
        limit: Number of rows at the start of each split whose images are inspected; 0 inspects none. All by default.
        decode: Whether to decode every image, which also finds truncated images; otherwise only headers are read.
        hash_images: Whether to find images shared by two splits also by a hash of their bytes; reads all files.
        buckets: (height, width) of each aspect bucket to sort image sizes into; by default those of the released
            diffusion-rm cache. Only ``cache`` uses buckets, see its ``images.buckets``.
        scores: Score table, .csv or .parquet. Adds how often each scorer scores the chosen image below the rejected
            one, and how many pairs each published strategy of multi-preference consistent filtering keeps. Floors of
            your own are settings of ``FilteredReader``.
        output: JSON file to write the counts to.

    Raises:
        InputError: If a setting is wrong, the format is not recognised, or no split can be read.
        KeyboardInterrupt: After the report, if Ctrl-C or SIGTERM ended the inspection early.
    """
    sources = list(_find_sources(data, reader, splits))
    score_table = None if scores is None else ScoreTable(scores)
    sizes = PUBLISHED_BUCKETS if buckets is None else sort_buckets(buckets)
    report = Report(data or ", ".join(name for name, _ in sources), decoded=decode)
    report.others = {} if data is None else other_formats(data)
    contents: dict[str, SplitContents] = {}
    stop: KeyboardInterrupt | None = None
    logger = logging.getLogger("latentreward.data.readers.base")
    try:
        for name, build in sources:
            level = logger.level
            logger.setLevel(logging.ERROR)  # the report repeats the readers' warnings about rows
            try:
                found = build if isinstance(build, PairReader) else build()
            except InputError as error:
                if len(sources) == 1:
                    raise
                report.unread[name] = str(error)
                continue
            finally:
                logger.setLevel(level)
            census = ImageCensus(sizes, decode, hash_images, MIN_PIXELS if buckets is None else 0, found.exif)
            counts, contents[name] = inspect_reader(name, found, census, limit)
            report.splits.append(counts)
            if census.interrupt is not None:
                raise census.interrupt
            if score_table is not None:
                try:
                    report.scores[name] = inspect_scores(score_table.gaps(found))
                except InputError as error:
                    report.scores_note[name] = str(error)
    except KeyboardInterrupt as error:
        stop, report.complete = error, False
    if not report.splits and report.unread:
        raise InputError(next(iter(report.unread.values())))
    report.leakage = [find_leakage(*pair, (contents[pair[0]], contents[pair[1]])) for pair in combinations(contents, 2)]
    print(printable(report.to_text()))
    if output is not None:
        write_file(output, json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
    if stop is not None:
        raise stop


def _find_sources(
    data: str | None, reader: PairReader | list[PairReader] | None, splits: str | None
) -> Iterator[tuple[str, PairReader | Callable[[], PairReader]]]:
    """Yield the name of each split, and its reader or a function that builds the reader."""
    if (data is None) == (reader is None):
        raise InputError("data: give either a folder or file, or --reader CLASS with its settings")
    if data is not None:
        found = recognise(data)
        names = [name.strip() for name in splits.split(",")] if splits else list(found)
        for name, build in choose_splits(found, names).items():
            yield name, partial(build, on_error="skip")
        return
    if splits is not None:
        raise InputError("splits: only for a folder that is recognised; give each reader its split")
    assert reader is not None  # see the first check
    taken: set[str] = set()
    for number, one in enumerate(reader if isinstance(reader, list) else [reader]):
        name = getattr(one, "split", "") or f"reader {number}"
        name = f"{name} {number}" if name in taken else name
        taken.add(name)
        yield name, one


run = partial(run_function, inspect)
