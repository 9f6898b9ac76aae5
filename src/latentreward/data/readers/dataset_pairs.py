"""Reader of pairs of your own in a table: a ``datasets`` object or folder, parquet files, or a hub data set."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError, did_you_mean, quoted
from latentreward.data.readers.base import Sources
from latentreward.data.readers.json_rows import (
    SOURCES,
    edit_problem,
    edit_remark,
    find_edit_source,
)
from latentreward.data.readers.pair_rows import BY_LABEL, MODELS, NO_LABEL, NOISES, WINNER_FIRST, PairRowParser
from latentreward.data.readers.parquet_store import plain_type
from latentreward.data.readers.rows import ROWS_AT_ONCE, RowReader
from latentreward.data.readers.tables import (
    Source,
    class_names,
    element_type,
    holds_images,
    name_class,
    open_table,
    source_name,
    warn_row_groups,
)

OPTIONAL = ("label", "votes", "confidence", "weight", "pair_id", "group_id", *MODELS, *NOISES, SOURCES[0])
KEYS = ("key_a", "key_b")
"""Columns with the names of the first and the second image."""
SOURCE_KEYS = "source_keys"
"""Column with the names of the pictures to edit."""
FIELDS = ("prompt", *WINNER_FIRST, *BY_LABEL, *OPTIONAL, *KEYS, SOURCE_KEYS)


class DatasetPairReader(RowReader):
    """Reader of a table with columns ``prompt`` and ``chosen``, ``rejected`` or ``image_a``, ``image_b``, ``label``.

    The columns mean what the keys of :class:`~latentreward.data.JSONLPairReader` mean, and are checked by
    the same rules. A column of images holds bytes, structs with ``bytes`` or ``path`` as ``datasets`` writes them for
    its feature ``Image``, or paths. Optional columns are ``votes``, ``confidence``, ``weight``, ``pair_id`` (default
    ``FILE:ROW``, or ``SPLIT:ROW`` of a ``Dataset``), ``group_id``, ``model_a``, ``model_b``, ``noise_a``, ``noise_b``
    and, with the names of the two images, ``key_a`` and ``key_b``; an image without name is named by a hash of its
    bytes. The pictures that the two images are edits of are in ``source_images``, a picture or a list of them, with
    their names in ``source_keys``; without these, whoever asks for all prompts has all these pictures read once. Other
    columns are not read. A label with the feature ``ClassLabel`` counts by the name of its class, which must be ``a``,
    ``b``, ``tie`` or a number.

    The constructor reads all these columns but the images, which are read row by row. No code of a data set is run.

    Args:
        source: Folder that ``save_to_disk`` wrote; folder that holds ``{split}-*.parquet`` or ``{split}.parquet``,
            directly or in ``data/``; one parquet file or a pattern of files; otherwise the id of a hub data set of
            parquet files, which is then downloaded. From Python also a ``Dataset`` or ``DatasetDict``.
        split: Name of the split.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        config: Name of the configuration, where the hub data set has several.
        columns: Names of the columns where they differ, by the names above, e.g. ``{prompt: caption, image_a: jpg_0,
            image_b: jpg_1, label: label_0}``.
        root: Folder that paths in columns are relative to and that the files must lie in; by default the folder of
            ``source``. Paths in a ``Dataset`` may lead anywhere if ``root`` is not given.
        memory_map: Copy the images of parquet files once into the cache of ``datasets``. Reading a row in random order
            then reads only this row, not its row group.
        options: See :class:`~latentreward.data.readers.rows.RowReader`. Rows with ``chosen`` and
            ``rejected`` change sides at random; rows with ``image_a`` and ``image_b`` stay as written.

    Raises:
        InputError: If the split cannot be found, is damaged, lacks a column or rows, a column has another type, or a
            row breaks a rule under ``on_error: raise``.
    """

    def __init__(
        self,
        source: Source,
        split: str = "train",
        *,
        revision: str | None = None,
        config: str | None = None,
        columns: Mapping[str, str] | None = None,
        root: PathText | None = None,
        memory_map: bool = False,
        **options: Any,
    ) -> None:
        name = source_name(source)
        super().__init__(Path(name).name, split, **options)
        self.folder = Path(root) if root else None
        self._rows = open_table(self, source, split, revision, config)
        ((place, schema), *_) = self._rows.schemas()
        chosen = choose_columns(schema, columns or {}, place, self.sources)
        self._fields = WINNER_FIRST if WINNER_FIRST[0] in chosen else BY_LABEL
        images = [chosen[field] for field in self._fields]
        embedded = any(holds_images(schema.field(image).type) for image in images)
        sources = chosen.get(SOURCES[0])
        self._sources = sources if sources and holds_images(element_type(schema.field(sources).type)) else None
        self._embedded = dict(zip(self._fields, images, strict=True)) if embedded else {}
        if self._sources is not None:
            self._embedded[SOURCES[0]], self.sources_in = self._sources, (self._rows, self._sources)
        self._classes = class_names(schema, chosen.get("label", ""))
        if embedded:
            self._rows.check_images(images, "give bytes or paths in both columns of images")
        if self._sources is not None:
            self._rows.check_images([self._sources], "give bytes or paths in every file", lists=True)
        paths = [column for column in (*images, sources) if column and column not in self._embedded.values()]
        if paths and not self.folder.exists():
            raise InputError(f"root: {place} holds paths in {paths[0]}; set root to the folder of the image files")
        read = {field: column for field, column in chosen.items() if field not in self._embedded}
        index = self._rows.read_index(dict.fromkeys(read.values()), "give every file of the split the same columns")
        if self._embedded:
            self._rows.open_images([*self._embedded.values()], memory_map)
        parser = PairRowParser(self, self.check_path)
        self.table = parser.table(self._read_rows(index, read))
        if self.remarks[NO_LABEL] and "label" not in chosen:
            parser.rename_no_label(f"no column label among {', '.join(schema.names)}; name it in columns")
        if self.sources == "ignore" and (edited := edit_column(schema, chosen.values())):
            self.remarks[edit_remark(edited)] += len(self)
        if self._embedded and not memory_map:
            warn_row_groups(self._rows, [*self._embedded.values()], f"{name} {split}")
        self.report(f"{name} {split}", f"split: {split!r} of {name} has no rows left; check the files")

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return the images of a row with their bytes, or references to their files."""
        if self._fields[0] not in self._embedded:
            return super().find_images(row)
        values = self._rows.read(row["row"], [self._embedded[field] for field in self._fields])
        return self.embedded_images(values, [row["image_a"], row["image_b"]])

    def check_path(self, pair_id: str, field: str, path: Any) -> None:
        """Check a path in a column of paths, see the base class."""
        if field not in self._embedded:
            super().check_path(pair_id, field, path)

    def _read_rows(self, index: pa.Table, read: Mapping[str, str]) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Yield name, number and fields of every row; the fields of images in bytes hold the images' names."""
        names, number = self._rows.row_names(), 0
        for batch in index.to_batches(max_chunksize=ROWS_AT_ONCE):
            for values in zip(*(batch.column(column).to_pylist() for column in read.values()), strict=True):
                row = dict(zip(read, values, strict=True))
                keys = [row.pop(key, None) for key in KEYS]
                source_keys = row.pop(SOURCE_KEYS, None)
                if self._fields[0] in self._embedded:
                    row |= dict(zip(self._fields, keys, strict=True))
                if self._sources is not None:
                    row[SOURCES[0]] = source_keys
                if self._classes is not None:
                    row["label"] = name_class(self._classes, row["label"])
                yield names[number].as_py(), number, row
                number += 1


def edit_column(schema: pa.Schema, known: Collection[str]) -> str | None:
    """Return the first column, none of ``known``, with pictures that a row's images are edits of; None without one."""
    unread = (field for field in schema if field.name not in known)
    return find_edit_source({field.name: b"x" if holds_images(element_type(field.type)) else "x" for field in unread})


def choose_columns(schema: pa.Schema, named: Mapping[str, str], place: str, sources: Sources) -> dict[str, str]:
    """Choose the column of each of ``FIELDS``; of images, ``chosen`` and ``rejected``, or ``image_a`` and ``image_b``.

    The pictures to edit are in ``source_images`` or ``source_image``; they are left out if ``sources`` is ``"ignore"``.

    Raises:
        InputError: If there is no such field or column, the prompt or the images are missing or could be several, or
            there is another column of pictures to edit.
    """
    for field, column in named.items():
        if field not in FIELDS:
            raise InputError(f"columns: there is no field {field!r}{did_you_mean(field, FIELDS)}")
        if column not in schema.names:
            raise InputError(f"columns.{field}: no column {column!r} in {place}{did_you_mean(column, schema.names)}")
    found = {field: named.get(field, field) for field in FIELDS if named.get(field, field) in schema.names}
    if SOURCES[0] not in found and SOURCES[1] in schema.names:
        found[SOURCES[0]] = SOURCES[1]
    if sources == "ignore":
        found.pop(SOURCES[0], None)
    elif edited := edit_column(schema, found.values()):
        raise InputError(
            f"{place}: {edit_problem(edited)}, or name it in columns, e.g. columns: {{{SOURCES[0]}: {edited}}}"
        )
    there = f"it has {quoted(', '.join(schema.names))}"
    if "prompt" not in found:
        raise InputError(f"{place}: no column prompt ({there}); name it, e.g. columns: {{prompt: caption}}")
    kinds = {field: schema.field(found[field]).type for field in (*WINNER_FIRST, *BY_LABEL) if field in found}
    texts = (pa.string(), pa.large_string())
    odd = {field: kind for field, kind in kinds.items() if not holds_images(kind) and plain_type(kind) not in texts}
    pairs = [pair for pair in (WINNER_FIRST, BY_LABEL) if all(one in found and one not in odd for one in pair)]
    asked = [pair for pair in pairs if any(field in named for field in pair)]
    if len(asked or pairs) != 1:
        types = ", ".join(f"{found[field]} is {kind}" for field, kind in odd.items())
        what = "no columns of images or paths" + (f" ({types})" if types else "") if not pairs else "both"
        raise InputError(
            f"{place}: {what} chosen and rejected, or image_a and image_b ({there}); name one pair of them, e.g. "
            "columns: {image_a: jpg_0, image_b: jpg_1, label: label_0}"
        )
    (images,) = asked or pairs
    unused = {*WINNER_FIRST, *BY_LABEL} - {*images}
    return {field: column for field, column in found.items() if field not in unused}
