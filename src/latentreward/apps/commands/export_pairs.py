"""``latentreward export-pairs``: write a reader's pairs as a data set that the library ``datasets`` loads."""

from functools import partial
from pathlib import Path

from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import locked
from latentreward.data import PairReader
from latentreward.data.dataset_export import export_split
from latentreward.diffusion.cache.writing import describe_data


def export_pairs(output: Path, reader: PairReader, *, split: str | None = None, rows_per_file: int = 1000) -> None:
    """Write the pairs of any reader as one split of a data set, which load_dataset(OUTPUT) and DatasetPairReader read.

    The images' bytes are copied as they are. Several splits may be written to one folder, by one command each. The same
    command goes on after a kill with the files that are missing, and refuses other rows.

    Args:
        output: Folder of the data set; the files are ``OUTPUT/data/SPLIT-00000-of-00012.parquet`` and so on.
        reader: Reader of the pairs, labelled or not. Its ``on_error`` also holds for images that cannot be read.
        split: Name of the split; by default the reader's.
        rows_per_file: Rows of the reader per file; a killed export loses at most one unfinished file.

    Raises:
        InputError: If a setting is wrong, an image cannot be read under ``on_error: raise``, or ``output`` holds the
            split of other data.
    """
    name = split or getattr(reader, "split", "") or "train"
    with locked(output, "output"):
        found = export_split(reader, output, name, describe_data(reader), rows_per_file)
    size = sum(file.stat().st_size for file in found.files)
    files = f"{len(found.files)} files ({found.written} written now), {size / 1e6:.1f} MB"
    print(f"{output}: {found.rows} pairs of {name} in {files}; {found.left_out} rows left out")
    print(f"read it by DatasetPairReader with source {output}, split {name} and exif {reader.exif}")


run = partial(run_function, export_pairs)
