"""Reader of Pick-a-Pic v1 and v2: parquet files with pairs of JPEGs and the users' choices."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentreward.core.contracts import ImageRef
from latentreward.data.readers.rows import RowReader
from latentreward.data.readers.tables import Source, empty_long_prompts, open_table, source_name, warn_row_groups

IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
COLUMNS = {
    "caption": pa.large_string(),
    "has_label": pa.bool_(),
    "label_0": pa.float64(),
    "label_1": pa.float64(),
    "image_0_uid": pa.string(),
    "image_1_uid": pa.string(),
    "num_example_per_prompt": pa.int64(),
    "are_different": pa.bool_(),
    "model_0": pa.string(),
    "model_1": pa.string(),
}
PUBLISHED = {
    "uid_0": "image_0_uid",
    "uid_1": "image_1_uid",
    "model_a": "model_0",
    "model_b": "model_1",
    "label_0": "label_0",
}
"""Column of a reader's table → published column."""
TOLERANCE = 1e-6
WITHOUT_IMAGES = (
    "this is the copy without images: take the copy with images, or set images to none for prompts and labels"
)
SCHEMA_HINT = "give the published parquet files, or write a PairReader for your own"


class PickAPicReader(RowReader):
    """Reader of one split of Pick-a-Pic; image 0 is a, image 1 is b.

    The label is ``label_0`` (1, 0, or ½ for a tie; ties are kept). A row is unlabelled, and ignored in training and
    metrics, if ``has_label`` is not true, a label is null, or the two labels do not add up to 1, e.g. (1, 1).
    ``best_image_uid`` is not used, because its values for ties and nulls are not documented. A row falls under
    ``on_error`` if it has a label that is NaN or outside [0, 1], or a caption that is too long. A null caption is read
    as an empty prompt. Duplicate rows are kept. An image without uid is named by a hash of its bytes.

    The constructor reads all columns but the images.

    Args:
        source: Folder that holds ``{split}-*.parquet``, directly or in ``data/``, or ``{split}.parquet``; one parquet
            file or a pattern of files; a folder that ``save_to_disk`` wrote; otherwise the id of a hub data set, which
            is then downloaded. From Python also a ``Dataset`` or ``DatasetDict``.
        split: Name of the split, e.g. ``train``, ``validation_unique`` or ``test_unique``.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        drop_identical: Leave out rows with two identical images (``are_different`` false, or equal uids); recommended
            for training.
        weight: Weight of a row in the loss. ``per_prompt`` is 1 / ``num_example_per_prompt`` (the number of rows with
            the row's prompt), so that each prompt counts once, as in the training of PickScore and LRM; 1 if this
            number is null or not positive. ``equal`` is 1 for every row.
        memory_map: Copy the images once into the cache of ``datasets``, which takes as much disk space as the download.
            Reading a row in random order then reads only this row. Without the copy, its whole row group is read, which
            is slow for the published files with hundreds of rows in a group.
        images: ``read``, which training needs, reads the images. ``none`` does not, for score tables, for
            ``latentreward inspect``, and for the copy of the data set that is published without images.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`. Under ``skip`` and
            ``placeholder`` a split with missing files is read without them.

    Raises:
        InputError: If the split cannot be found, lacks a file, a column or rows, or breaks a rule above under
            ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(
        self,
        source: Source,
        split: str,
        *,
        revision: str | None = None,
        drop_identical: bool = False,
        weight: Literal["per_prompt", "equal"] = "per_prompt",
        memory_map: bool = False,
        images: Literal["read", "none"] = "read",
        **options: Any,
    ) -> None:
        super().__init__("pickapic", split, randomise_sides=False, seed=0, **options)
        self.holds = "images" if images == "read" else "nothing"
        self._rows, name = open_table(self, source, split, revision), source_name(source)
        index = self._rows.read_index(COLUMNS, SCHEMA_HINT)
        if images == "read":
            self._rows.check_images(IMAGES, SCHEMA_HINT, WITHOUT_IMAGES)
        columns = {column: index.column(column).combine_chunks() for column in COLUMNS}
        names = self._rows.row_names()
        columns["caption"], long = empty_long_prompts(self, columns["caption"], names)
        labels, keep = self._judge_labels(columns, names, long)
        if drop_identical:
            other_uid = pc.not_equal(columns["image_0_uid"], columns["image_1_uid"]).fill_null(True)
            different = pc.and_(columns["are_different"].fill_null(True), other_uid).to_numpy(zero_copy_only=False)
            if dropped := int((keep & ~different).sum()):
                self.skipped["identical images"] += dropped
            keep &= different
        table = pa.table(
            {
                "pair_id": names,
                "prompt": columns["caption"],
                "label": pa.array(labels, from_pandas=True),
                "row": np.arange(len(labels)),
                **{ours: columns[published] for ours, published in PUBLISHED.items()},
            }
        )
        if weight == "per_prompt":
            examples = columns["num_example_per_prompt"].cast(pa.float64())
            weights = pc.if_else(pc.greater(examples, 0).fill_null(False), pc.divide(1.0, examples), 1.0)
            table = table.append_column("weight", weights)
        self.table = table.filter(pa.array(keep))
        self._remark("null caption read as empty", _is_null(columns["caption"])[keep])
        if images == "read":
            self._rows.open_images(IMAGES, memory_map)
        if images == "read" and not memory_map:
            warn_row_groups(self._rows, IMAGES, f"{name} {split}")
        empty = f"split: {split!r} of {name} has no rows left; check the files and drop_identical"
        self.report(f"{name} {split}", empty)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return both images of a row with their bytes, or their names alone."""
        values = self._rows.read(row["row"]) if self.holds == "images" else (None, None)
        return self.embedded_images(values, [row["uid_0"], row["uid_1"]])

    def _judge_labels(
        self, columns: dict[str, pa.Array], names: pa.Array, refused: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the label of image 0, NaN for unlabelled rows, and whether to keep each row; both ``(rows,)``.

        Rows with bad labels fall under ``on_error``, and are added to those that did before, ``refused`` ``(rows,)``.
        """
        has_label = columns["has_label"].fill_null(False).to_numpy(zero_copy_only=False)
        null = _is_null(columns["label_0"]) | _is_null(columns["label_1"])
        label_0, label_1 = (columns[name].fill_null(0.5).to_numpy() for name in LABELS)
        for name, values in zip(LABELS, (label_0, label_1), strict=True):
            bad = has_label & ~refused & ~((values >= 0) & (values <= 1))
            if bad.any():
                first = int(np.flatnonzero(bad)[0])
                problem = f"{name} is {values[first]}, not in [0, 1]"
                self.refuse(names[first].as_py(), problem, "label outside [0, 1] or NaN", int(bad.sum()))
            refused |= bad
        candidates = has_label & ~refused
        unequal = np.abs(label_0 + label_1 - 1) > TOLERANCE
        self._remark("unlabelled (has_label is not true)", ~has_label)
        self._remark("unlabelled (null label)", candidates & null)
        self._remark("unlabelled (labels do not add up to 1)", candidates & ~null & unequal)
        labels = np.where(candidates & ~null & ~unequal, label_0, np.nan)
        return labels, ~refused if self.on_error == "skip" else np.ones_like(refused)

    def _remark(self, reason: str, rows: np.ndarray) -> None:
        if rows.any():
            self.remarks[reason] += int(rows.sum())


def _is_null(column: pa.Array) -> np.ndarray:
    return column.is_null().to_numpy(zero_copy_only=False)
