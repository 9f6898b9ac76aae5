"""Readers of pairs of your own in a table: JSON lines, a JSON list, CSV, TSV, parquet, ``datasets``, or the hub."""

import os
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, did_you_mean, quoted
from latentreward.core.storage.user_files import find_files
from latentreward.data.readers.base import Sources
from latentreward.data.readers.json_rows import SOURCES, edit_problem, find_edit_source
from latentreward.data.readers.rows import BY_LABEL, MODELS, NOISES, WINNER_FIRST, PairRowParser, Row, RowReader
from latentreward.data.readers.tables import (
    Source,
    element_type,
    find_list,
    holds_images,
    open_table,
    read_list,
    source_name,
)

OPTIONAL = ("label", "votes", "confidence", "weight", "pair_id", "group_id", "split", *MODELS, *NOISES, SOURCES[0])
KEYS = ("key_a", "key_b")
"""Columns with the names of the first and the second image."""
SOURCE_KEYS = "source_keys"
"""Column with the names of the pictures to edit."""
FIELDS = ("prompt", *WINNER_FIRST, *BY_LABEL, *OPTIONAL, *KEYS, SOURCE_KEYS)
FIRST_ROWS = 64
"""Rows of a list whose fields are looked at before all are read."""


class DatasetPairReader(RowReader):
    """Reader of a table of pairs of your own, of whatever format.

    A row has a ``prompt`` and either ``chosen`` and ``rejected``, or ``image_a``, ``image_b`` and ``label``::

        {"prompt": "a cat", "chosen": "images/1.jpg", "rejected": "images/2.jpg"}
        {"prompt": "a cat", "image_a": "images/1.jpg", "image_b": "images/2.jpg", "label": 0.5}

    ``label`` is the probability in [0, 1] that a is preferred (½ for a tie), or ``"a"``, ``"b"`` or ``"tie"``; labels
    of another kind are given by ``labels``. A row with a null or missing label is unlabelled. Optional are ``votes``
    ([a, b] or [chosen, rejected]), ``confidence`` in [0, 1], ``weight`` (of the pair in the loss, 0 or more),
    ``pair_id`` (default ``FILE:ROW``, or ``SPLIT:ROW`` of a ``Dataset``), ``group_id``, ``split`` (by which a cache
    tells the splits of one file apart), and of the first and the second image ``model_a`` and ``model_b``, the names of
    their generators, ``noise_a`` and ``noise_b``, the column ``noise`` of the table of ``latentreward generate``, and
    in tables with bytes ``key_a`` and ``key_b``, their names. If the images are edits of pictures, ``source_images``
    lists these in their order (or ``source_image`` has the only one; ``source_keys`` are the names of those in bytes),
    and ``prompt`` is the instruction. Other columns are not read.

    Images are paths, relative to ``root``; in parquet and ``datasets`` also bytes, or structs with ``bytes`` or
    ``path`` as ``datasets`` writes them for its feature ``Image``. An image in bytes without a name is named by a hash.
    A row is also bad if its label or weight is out of range, an image has more than a billion votes, its ``pair_id``
    occurred before, or it has more than 16 pictures to edit or one in another field. Unreadable ``votes`` and
    ``confidence`` are ignored. No code of a data set is run.

    Args:
        source: File ``.jsonl``, ``.json`` (a list), ``.csv``, ``.tsv`` or ``.parquet``, or a pattern of parquet files;
            folder that holds such a file of the split, such as ``train.csv``, or ``{split}-*.parquet``, the latter also
            in ``data/``; otherwise the id of a hub data set of parquet files, which is then downloaded. From Python
            also a ``Dataset`` or ``DatasetDict``.
        split: Name of the split.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        config: Name of the configuration, where the hub data set has several.
        columns: Names of the columns where they differ, e.g. ``{prompt: caption, image_a: jpg_0, image_b: jpg_1}``.
        labels: Meaning of each label of the table, ``a``, ``b``, ``tie`` or a probability: ``{left: a, right: b}``.
            Needed for whole numbers, which many programs count the winner by: ``{0: a, 1: b}``, or ``{1: a, 0: b}``.
        root: Folder that paths are relative to and that the files must lie in; by default the folder of ``source``.
            Paths in a ``Dataset`` may lead anywhere if ``root`` is not given.
        memory_map: Copy the images of parquet files once into the cache of ``datasets``. Reading a row in random order
            then reads only this row, not its row group.
        options: See :class:`~latentreward.data.readers.rows.RowReader`. Of rows with ``chosen`` and ``rejected``, the
            chosen image is a or b at random; rows with ``image_a`` and ``image_b`` stay as written.
    """

    def __init__(
        self,
        source: Source,
        split: str = "train",
        *,
        revision: str | None = None,
        config: str | None = None,
        columns: Mapping[str, str] | None = None,
        labels: Mapping[str | int, str | float] | None = None,
        root: PathText | None = None,
        memory_map: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(Path(source_name(source)).name, split, **options)
        self.folder = Path(root) if root else None
        file = None if _has_parquet(source, split) else find_list(source, split)
        if file is not None:
            if file != Path(source):
                self.check_inside(source, file)
            fill_from_list(self, file, columns, labels)
            return
        table = open_table(self, source, split, revision, config)
        ((place, schema), *_) = table.schemas()
        own = OwnColumns(schema, columns or {}, place, self.sources)
        images, hint = [own.of[field] for field in own.images], "give bytes or paths in both columns of images"
        if any(holds_images(schema.field(image).type) for image in images):
            table.check_images(images, hint)
            own.embedded, self.images_in = {*own.images}, (table, images)
        sources = own.of.get(SOURCES[0])
        if sources and holds_images(element_type(schema.field(sources).type)):
            table.check_images([sources], "give bytes or paths in every file", lists=True)
            own.embedded, self.sources_in = {*own.embedded, SOURCES[0]}, (table, sources)
        paths = [own.of[field] for field in (*own.images, SOURCES[0]) if field in own.of and field not in own.embedded]
        if paths and not self.folder.exists():
            raise InputError(f"root: {place} holds paths in {paths[0]}; set root to the folder of the image files")
        read = dict.fromkeys(column for field, column in own.of.items() if field not in own.embedded)
        rows = table.records(read, "give every file of the split the same columns")
        if own.embedded:
            table.open_images([own.of[field] for field in sorted(own.embedded)], memory_map)

        def check_path(pair_id: str, field: str, path: Any) -> None:
            if (self.sources_in if field in SOURCES else self.images_in) is None:
                self.check_path(pair_id, field, path)

        parser = PairRowParser(self, check_image=check_path, labels=labels)
        self.table = parser.table((name, number, own.read(values)) for name, number, values in rows)
        self.report(table.name, f"split: {table.name} has no rows left; check the files")


class JSONLPairReader(RowReader):
    """Reader of one file of pairs of your own: JSON lines, a JSON list, CSV or TSV; see :class:`DatasetPairReader`.

    Args:
        file: Path of the file.
        root: Folder that paths are relative to and that all images must lie in; by default the file's folder.
        split: Name of the split of rows without their own.
        columns: Names of the columns where they differ, see :class:`DatasetPairReader`.
        labels: Meaning of each label in the file, see :class:`DatasetPairReader`; needed for whole numbers.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    def __init__(
        self,
        file: PathText,
        root: PathText | None = None,
        split: str = "train",
        *,
        columns: Mapping[str, str] | None = None,
        labels: Mapping[str | int, str | float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(Path(file).name, split, **options)
        if Path(file).is_dir():
            raise InputError(f"file: {file} is a folder; give a file, or read it by DatasetPairReader")
        self.folder = Path(root) if root else None
        fill_from_list(self, Path(file), columns, labels)


def fill_from_list(
    reader: RowReader, file: Path, columns: Mapping[str, str] | None, labels: Mapping[Any, Any] | None
) -> None:
    """Give a reader the pairs of a table of text; of a file of another suffix, as JSON lines."""
    reader.folder, columns = reader.folder or file.parent, columns or {}
    rows = open_list(file, columns)
    parser = PairRowParser(reader, columns=columns, check_image=reader.check_path, labels=labels)
    reader.fill(rows, str(file), f"file: {file} has no rows left; check it", parser)


def open_list(file: Path, columns: Mapping[str, str], whole: bool = True) -> Iterator[Row]:
    """Return the rows of a table of text; raise InputError if the first rows lack a column that ``columns`` names.

    A ``whole`` table also needs columns of prompts and of two images.
    """
    rows = read_list(file)
    first = [*islice(rows, FIRST_ROWS)]
    names = list(dict.fromkeys(name for _, _, row in first if isinstance(row, dict) for name in row))
    check_columns(columns, names, str(file))
    if names and whole:
        find_images([field for field in FIELDS if columns.get(field, field) in names], names, file)
    return chain(first, rows)


class OwnColumns:
    """Columns of a table of pairs of your own by their field.

    Attributes:
        of: Field → column.
        images: Fields of the two images.
        embedded: Fields of images in bytes; the names of these images take their place in a row.
    """

    def __init__(self, schema: pa.Schema, named: Mapping[str, str], place: str, sources: Sources) -> None:
        self.of = choose_columns(schema, named, place, sources)
        self.images = WINNER_FIRST if WINNER_FIRST[0] in self.of else BY_LABEL
        self.embedded: set[str] = set()

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row by field."""
        row = {field: values[column] for field, column in self.of.items() if field not in self.embedded}
        keys, source_keys = [row.pop(key, None) for key in KEYS], row.pop(SOURCE_KEYS, None)
        if self.embedded.issuperset(self.images):
            row |= dict(zip(self.images, keys, strict=True))
        if SOURCES[0] in self.embedded:
            row[SOURCES[0]] = source_keys
        return row


def check_columns(named: Mapping[str, str], names: Collection[str], place: str) -> None:
    """Raise InputError for a map of columns with a name that is no field of a pair, or no column."""
    for field, column in named.items():
        if field not in FIELDS:
            raise InputError(f"columns: there is no field {field!r}{did_you_mean(field, FIELDS)}")
        if column not in names:
            raise InputError(f"columns.{field}: no column {column!r} in {place}{did_you_mean(column, names)}")


def _has_parquet(source: Source, split: str) -> bool:
    if not isinstance(source, str | os.PathLike):
        return False
    folders = Path(source, "data"), Path(source)
    return any(find_files(folder, f"{split}{end}.parquet") for folder in folders for end in ("", "-*"))


def choose_columns(schema: pa.Schema, named: Mapping[str, str], place: str, sources: Sources) -> dict[str, str]:
    """Choose the column of each of ``FIELDS``; of images, ``chosen`` and ``rejected``, or ``image_a`` and ``image_b``.

    The pictures to edit are in ``source_images`` or ``source_image``; they are left out if ``sources`` is ``"ignore"``.
    """
    check_columns(named, schema.names, place)
    found = {field: named.get(field, field) for field in FIELDS if named.get(field, field) in schema.names}
    if SOURCES[0] not in found and SOURCES[1] in schema.names:
        found[SOURCES[0]] = SOURCES[1]
    if sources == "ignore":
        found.pop(SOURCES[0], None)
    elif edited := find_edit_source(
        {one.name: b"image" if holds_images(element_type(one.type)) else True for one in schema}, found.values()
    ):
        raise InputError(
            f"{place}: {edit_problem(edited)}, or name it in columns, e.g. columns: {{{SOURCES[0]}: {edited}}}"
        )
    pairs = find_images(found, schema.names, place)
    asked = [pair for pair in pairs if any(field in named for field in pair)]
    if len(asked or pairs) > 1:
        raise InputError(
            f"{place}: both chosen and rejected, and image_a and image_b; name one pair of them in columns"
        )
    (images,) = asked or pairs
    unused = {*WINNER_FIRST, *BY_LABEL} - {*images}
    return {field: column for field, column in found.items() if field not in unused}


def find_images(found: Collection[str], names: Collection[Any], place: object) -> list[tuple[str, str]]:
    """Return the fields of two images among the fields ``found``; ``names`` are all columns of ``place``."""
    there = quoted(f"it has {', '.join(map(str, names))}")
    if "prompt" not in found:
        raise InputError(f"{place}: no column prompt ({there}); name it, e.g. columns: {{prompt: caption}}")
    if pairs := [pair for pair in (WINNER_FIRST, BY_LABEL) if all(one in found for one in pair)]:
        return pairs
    remedy = "name one pair of them, e.g. columns: {image_a: jpg_0, image_b: jpg_1, label: label_0}"
    raise InputError(f"{place}: no columns chosen and rejected, or image_a and image_b ({there}); {remedy}")
