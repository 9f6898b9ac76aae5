"""``latentreward inspect``: print what a data set holds, before anything is trained on it."""

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


def inspect(
    data: PathText | None = None,
    reader: PairReader | None = None,
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
        reader: Reader to inspect, instead of DATA.
        splits: Splits of DATA to read, e.g. ``train,test``; all by default.
        limit: Number of rows at the start of each split whose images are inspected; 0 inspects none. All by default.
        decode: Whether to decode every image, which also finds truncated images; otherwise only headers are read.
        output: JSON file to write the counts to.
    """
    readers, unread = _open(data, reader, splits)
    report = Report(data or ", ".join(readers), decode)
    report.unread |= unread
    report.splits += [inspect_reader(name, one, decode, limit) for name, one in readers.items()]
    for first, second in combinations(readers, 2):
        shared = shared_prompts(readers[first].prompts(), readers[second].prompts())
        report.shared[f"{first} beside {second}"] = shared
    print(printable(report.to_text()))
    if output is not None:
        write_file(output, report.to_json())


def _open(
    data: str | None, reader: PairReader | None, splits: str | None
) -> tuple[dict[str, PairReader], dict[str, str]]:
    """Open the readers by name of their split; of splits that cannot be read, return the errors."""
    if reader is not None and (data or splits) is None:
        return {getattr(reader, "split", "") or "reader": reader}, {}
    if data is None or reader is not None:
        raise InputError("data: give a folder or file, perhaps with splits, or --reader CLASS with its settings")
    found = recognise(data)
    names = [name.strip() for name in splits.split(",")] if splits else list(found)
    readers, unread = dict[str, PairReader](), dict[str, str]()
    for name, build in choose_splits(found, names).items():
        try:
            readers[name] = build(on_error="skip")
        except InputError as error:
            unread[name] = str(error)
    if not readers:
        raise InputError(next(iter(unread.values())))
    return readers, unread


run = partial(run_function, inspect)
