"""Detection of a data set's format, and of its splits, from file names, columns and JSON keys."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from latentreward.core.errors import InputError, did_you_mean, quoted
from latentreward.core.storage.json_files import read_table
from latentreward.core.storage.user_files import find_files, whole_file
from latentreward.data.readers.base import PairReader
from latentreward.data.readers.dataset_pairs import DatasetPairReader, JSONLPairReader
from latentreward.data.readers.diffusion_rm import DiffusionRMReader
from latentreward.data.readers.edits import EditPairReader, find_layout
from latentreward.data.readers.folders import CAPTIONS_FILE, SIDES, FolderPairReader
from latentreward.data.readers.published import (
    GenAIBenchCMUReader,
    GenAIBenchReader,
    HPDv2Reader,
    HPDv3Reader,
    ImageRewardDBReader,
    ImageRewardReader,
    PickAPicReader,
)
from latentreward.data.readers.rows import BY_LABEL, WINNER_FIRST
from latentreward.data.readers.tables import (
    LISTS,
    ParquetPart,
    open_part,
)
from latentreward.data.readers.tars import PickAPicTarReader

Splits = dict[str, Callable[..., PairReader]]
"""Split -> function that constructs the split's reader; takes further options of the reader."""

PARQUET_FOLDERS = ("data", "image_generation", ".")
PART = re.compile(r"(.+?)-\d{5}-of-\d{5}.*\.parquet")
HEAD = 1 << 16
NAMED_COLUMNS = 12
EXPECTED = (
    "Pick-a-Pic parquet or tars, HPDv2, HPDv3, ImageReward, ImageRewardDB, GenAI-Bench, a diffusion-rm cache, "
    "a set of edits, chosen/ and rejected/, or a table (JSON, CSV, parquet) with prompt and "
    "chosen, rejected or image_a, image_b"
)


def recognise(data: str) -> Splits:
    """Find the readers for a folder or file, by split, in the order train…, val…, test…, others."""
    if not (path := Path(data)).exists():
        raise InputError(f"data: no folder or file {data!r}; name a data set of the hub as --reader CLASS with its id")
    for find in FORMATS:
        if splits := find(path):
            starts = ("train", "val", "test", "")
            return {name: splits[name] for start in starts for name in sorted(splits) if name.startswith(start)}
    columns = _keys(path) if path.suffix.lower() in (".csv", ".tsv") else set().union(*next(_tables(path), {}).values())
    if columns:
        told = f"a table whose columns no reader knows: {quoted(', '.join(sorted(columns)[:NAMED_COLUMNS]))}"
        flags = f"DatasetPairReader --reader.source {shlex.quote(data)} --reader.columns"
        flags = f"{flags} '{{prompt: COLUMN, image_a: COLUMN, image_b: COLUMN, label: COLUMN}}'"
        raise InputError(f"data: {data} is {told}; name those of a pair by --reader {flags}")
    told = f"data: {data} is none of {EXPECTED}; check the folder, or name a class, and its columns, by --reader"
    raise InputError(f"{told}, such as DatasetPairReader --reader.source 'PATTERN' --reader.columns '{{prompt: text}}'")


def choose_splits(splits: Splits, names: Iterable[str]) -> Splits:
    """Return the named splits in the order of ``names``."""
    for name in names:
        if name not in splits:
            raise InputError(f"splits: there is no split {name!r}{did_you_mean(name, splits)}")
    return {name: splits[name] for name in names}


def _diffusion_rm(path: Path) -> Splits:
    if path.is_file() and path.suffix == ".parquet" and "latent1" in _columns(path):
        return {path.stem: partial(DiffusionRMReader, str(path), None, split=path.stem)}
    indices = find_files(path, "bucket_index*.csv")
    if not indices and not find_files(path, "part_rank*.parquet"):
        return {}
    return {"train": partial(DiffusionRMReader, str(path), indices[0].name if indices else None)}


def _tables(path: Path) -> Iterator[dict[str, set[str]]]:
    """Yield the columns by split of the parquet files in each folder with some."""
    parquet = path.is_file() and path.suffix == ".parquet"
    for files in [[path]] if parquet else [find_files(path / folder, "*.parquet") for folder in PARQUET_FOLDERS]:
        found = {match[1] if (match := PART.fullmatch(file.name)) else file.stem: file for file in files}
        if found:
            yield {split: _columns(file) for split, file in found.items()}


def _table(path: Path) -> Splits:
    for found in _tables(path):
        splits = {split: build for split, names in found.items() if (build := _by_columns(names, str(path), split))}
        if splits:
            return splits
    return {}


def _by_columns(names: set[str], source: str, split: str) -> Callable[..., PairReader] | None:
    """Return the reader of a table with these columns; None if no reader knows them."""
    if {"caption", "label_0", "label_1"} <= names:
        images: Any = "read" if {"jpg_0", "jpg_1"} <= names else "none"
        return partial(PickAPicReader, source, split, images=images)
    if find_layout(names) is not None:
        return partial(EditPairReader, source, split)
    if {"left_image", "right_image"} <= names:
        return partial(GenAIBenchReader, source, split)
    if "HumanRatings" in names:
        return partial(GenAIBenchCMUReader, source, split)
    own = "prompt" in names and any(names.issuperset(pair) for pair in (WINNER_FIRST, BY_LABEL))
    return partial(DatasetPairReader, source, split) if own else None


def _imagereward_db(path: Path) -> Splits:
    splits = [file.stem.removeprefix("metadata-") for file in find_files(path, "metadata-*.parquet")]
    return {split: partial(ImageRewardDBReader, str(path), split) for split in splits}


def _lists(path: Path) -> Splits:
    if {"generations", "ranking"} <= _keys(path / "data" / "test.json"):
        return {"test": partial(ImageRewardReader, str(path))}
    files = [path] if path.is_file() and path.suffix.lower() in LISTS else find_files(path, "*")
    splits: Splits = {}
    for file in files:
        if file.suffix.lower() in LISTS and file.name != CAPTIONS_FILE and (build := _by_keys(_keys(file), file)):
            splits[file.stem] = build
    for file in find_files(path, "t[re]*/*.json"):  # HPDv3++: train/train_aes.json, test/test_aes.json
        if {"path1", "path2"} <= _keys(file) and file.parent.name in ("train", "test"):
            splits[file.stem] = partial(HPDv3Reader, str(path), f"{file.parent.name}/{file.stem}")
    return splits


def _by_keys(keys: set[str], file: Path) -> Callable[..., PairReader] | None:
    """Return the reader of a table of text with these keys; None if no reader knows them."""
    root = str(file.parent)
    if find_layout(keys) is not None:
        return partial(EditPairReader, str(file), file.stem)
    if {"path1", "path2"} <= keys:
        return partial(HPDv3Reader, root, file.stem)
    if {"file_path", "human_preference"} <= keys or {"image_path", "rank"} <= keys:
        return partial(HPDv2Reader, root, file.stem)
    if file.name == "test.json" and {"generations", "ranking"} <= keys:
        return partial(ImageRewardReader, root)
    own = any(keys.issuperset(pair) for pair in (WINNER_FIRST, BY_LABEL))
    return partial(JSONLPairReader, str(file), split=file.stem) if own else None


def _keys(file: Path) -> set[str]:
    """Return the columns of CSV or TSV; else all ``"word":`` words, likely JSON keys, in the first ``HEAD`` bytes."""
    if not file.is_file():
        return set()
    with whole_file(file).open("rb") as stream:
        head = stream.read(HEAD).decode("utf-8-sig", "replace")
    if (suffix := file.suffix.lower()) in (".csv", ".tsv"):
        return {*(read_table(head.split("\n", 1)[0], suffix).fieldnames or ())}
    return set(re.findall(r'"(\w+)"\s*:', head))


def _tars(path: Path) -> Splits:
    if path.suffix == ".tar" or find_files(path, "*.tar"):
        return {"train": partial(PickAPicTarReader, str(path))}
    splits = {tar.parent.name for tar in find_files(path, "*/*.tar")}
    return {split: partial(PickAPicTarReader, str(path), split) for split in splits}


def _folders(path: Path) -> Splits:
    if all((path / side).is_dir() for side in SIDES):
        return {"all": partial(FolderPairReader, str(path))}
    splits = {folder.parent.name for folder in find_files(path, "*/chosen") if (folder.parent / "rejected").is_dir()}
    return {split: partial(FolderPairReader, str(path), split) for split in splits}


def _columns(file: Path) -> set[str]:
    with open_part(ParquetPart(file.name, file)) as opened:
        return set(opened.schema_arrow.names)


FORMATS = (_diffusion_rm, _table, _imagereward_db, _tars, _folders, _lists)
"""Functions that find the splits of a format; the first that finds any decides."""
