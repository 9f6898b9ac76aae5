"""Writing of a reader's pairs as parquet files that the library ``datasets`` loads as one split."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentreward.core.contracts import PreferencePair, sources_of
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.storage.durable import replacing
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import RunFolder
from latentreward.data.images import ImageError, image_bytes, read_header
from latentreward.data.readers.base import OWN_ON_ERROR, PairReader

SPLIT = r"\w+(\.\w+)*"
"""Pattern of the names of splits that ``datasets`` allows."""
ROW_GROUP = 32
"""Rows that are decoded together when a row is read in random order, and kept in memory while writing."""
KEPT = "finished files are kept: free some space and run the same command again"


@dataclass(frozen=True)
class ExportedSplit:
    """Files of an exported split."""

    files: list[Path]  # parquet files, in the order of the rows
    rows: int  # in all files
    written: int  # number of files that this call wrote; the others were there
    left_out: int  # rows of the reader without a readable image, which ``on_error: skip`` left out


def export_split(
    reader: PairReader, output: Path, split: str, spec: Mapping[str, Any], rows_per_file: int = 1000
) -> ExportedSplit:
    """Write the pairs of a reader to ``OUTPUT/data/SPLIT-NNNNN-of-NNNNN.parquet``, with the images' bytes as they are.

    A file appears only when it is complete. Files that are there already are kept, so that a killed export goes on.
    A row with an image whose header cannot be read falls under the reader's ``on_error``; ``placeholder`` writes it
    without label and without that image. :class:`~latentreward.data.DatasetPairReader` reads the columns.
    """
    check_at_least_one(rows_per_file=rows_per_file)
    if not re.fullmatch(SPLIT, split):
        raise InputError(f"split is {split!r}; give a name of letters, digits and underscores")
    if reader.holds != "images":
        raise InputError(f"reader: {type(reader).__name__} holds {reader.holds}; only images can be exported")
    file, spec = output / f"export_{split}.json", {**spec, "rows_per_file": rows_per_file}
    remedy = f"choose another folder, or delete {file} and the files of {split}"
    record = RunFolder(output, file, spec, "output", remedy, KEPT)
    if file.is_file():
        record.compare()
    elif any((output / "data").glob(f"{split}-*.parquet")):
        raise InputError(f"output: {output} holds files of {split} that no export wrote; choose another folder")
    record.write()
    total = -(-len(reader) // rows_per_file)
    files = [output / "data" / f"{split}-{number:05d}-of-{total:05d}.parquet" for number in range(total)]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    edits = any(map(sources_of, reader.prompts()))
    with Progress("export-pairs", total, "files", total - len(missing)) as progress:
        for number in missing:
            rows = range(number * rows_per_file, min((number + 1) * rows_per_file, len(reader)))
            with replacing(files[number], KEPT) as partial:
                _write_rows(reader, rows, partial, edits)
            progress.add()
    rows = sum(pq.read_metadata(file.absolute()).num_rows for file in files)
    return ExportedSplit(files, rows, len(missing), len(reader) - rows)


def _write_rows(reader: PairReader, rows: range, file: Path, edits: bool) -> None:
    from datasets import Features, Image, List, Value  # slow to import

    sided = [f"{name}_{side}" for name in ("model", "key", "noise") for side in "ab"]
    texts = dict.fromkeys(("pair_id", "prompt", "group_id", *sided), Value("string"))
    numbers = dict.fromkeys(("label", "weight", "confidence"), Value("float64"))
    images = {"votes": List(Value("int64")), "image_a": Image(), "image_b": Image()}
    if edits:
        images |= {"source_images": List(Image()), "source_keys": List(Value("string"))}
    schema = Features(texts | numbers | images).arrow_schema
    with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
        kept: list[dict[str, Any]] = []
        for row in rows:
            if (values := _values(reader, reader[row])) is not None:
                kept.append(values)
            if len(kept) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(kept, schema))
                kept.clear()
        if kept:
            writer.write_table(pa.Table.from_pylist(kept, schema))


def _values(reader: PairReader, pair: PreferencePair) -> dict[str, Any] | None:
    """Return the columns of a pair, among others; None if ``on_error`` leaves it out."""
    images, sound = list[dict[str, Any] | None](), True
    sources = sources_of(pair.prompt)
    for image in (pair.image_a, pair.image_b, *sources):
        try:
            read_header(image)
            images.append({"bytes": image_bytes(image)})
        except ImageError as error:
            if reader.on_error == "raise":
                remedy = f"replace the file, or set {OWN_ON_ERROR} to skip or placeholder"
                raise ImageError(f"{pair.pair_id}: {error}; {remedy}", error.problem) from error
            images.append(None)
            sound = False
    if not sound and reader.on_error == "skip":
        return None
    keys: dict[str, Any] = {"key_a": pair.image_a.image_key, "key_b": pair.image_b.image_key}
    keys |= {"noise_a": pair.image_a.noise, "noise_b": pair.image_b.noise}
    if sources:
        keys |= {"source_images": images[2:], "source_keys": [source.image_key for source in sources]}
    label = {} if sound else {"label_a": None}
    row = vars(pair) | label | {"image_a": images[0], "image_b": images[1]} | keys
    return row | {"label": row["label_a"]}
