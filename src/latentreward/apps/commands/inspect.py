"""``latentreward inspect``: print what a data set holds, before anything is trained on it."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, printable
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import write_file
from latentreward.data import PairReader
from latentreward.data.format_detection import choose_splits, recognise
from latentreward.data.inspection import Report, inspect_reader, shared_prompts
from latentreward.data.readers.pair_rows import WholeNumbersError


def inspect(
    data: PathText | None = None,
    reader: PairReader | list[PairReader] | None = None,
    *,
    splits: str | None = None,
    limit: int | None = None,
    decode: bool = False,
    output: Path | None = None,
) -> None:
    """Print counts of rows, labels, prompts, image sizes, rows left out by reason, and prompts that splits share.

    The format of DATA and its splits are detected. Rows that break a rule of the format are left out and counted.

    Args:
        data: Folder of a data set, or one of its files.
        reader: One or several readers to inspect, instead of DATA.
        splits: Splits of DATA to read, e.g. ``train,test``; all by default.
        limit: Number of rows at the start of each split whose images are inspected; 0 inspects none. All by default.
        decode: Whether to decode every image, which also finds truncated images; otherwise only headers are read.
        output: JSON file to write the counts to.
    """
    sources = list(_find_sources(data, reader, splits))
    report = Report(data or ", ".join(name for name, _ in sources), decode)
    prompts: dict[str, list[str]] = {}
    logger = logging.getLogger("latentreward.data.readers.base")
    for name, build in sources:
        level = logger.level
        logger.setLevel(logging.ERROR)  # the report repeats the readers' warnings about rows
        try:
            found = build if isinstance(build, PairReader) else _opened(build)
        except InputError as error:
            if len(sources) == 1:
                raise
            report.unread[name] = str(error)
            continue
        finally:
            logger.setLevel(level)
        report.splits.append(inspect_reader(name, found, decode, limit))
        prompts[name] = found.prompts()
    if not report.splits:
        raise InputError(next(iter(report.unread.values())))
    for first, second in combinations(prompts, 2):
        report.shared[f"{first} beside {second}"] = shared_prompts(prompts[first], prompts[second])
    print(printable(report.to_text()))
    if output is not None:
        write_file(output, report.to_json())


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


def _opened(build: Callable[..., PairReader]) -> PairReader:
    """Open a recognised split; labels that are whole numbers are counted as probabilities, which is told."""
    try:
        return build()
    except WholeNumbersError as error:
        logging.getLogger(__name__).warning("%s; counted as 1: a, 0: b", error)
        return build(labels={1: "a", 0: "b"})


run = partial(run_function, inspect)
