"""GenAI-Bench of TIGER-Lab: votes on pairs of generated images, in parquet."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from latentreward.contracts import PreferencePair
from latentreward.data.readers.parquet_store import (
    ParquetPairReader,
    RowGroupColumns,
    check_image_columns,
    embedded_image,
    empty_long_prompts,
    locate,
)
from latentreward.errors import InputError

VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
COLUMNS = {"prompt": pa.large_string(), "left_model": pa.string(), "right_model": pa.string(), "vote_type": pa.string()}
IMAGES = ("left_image", "right_image")
HINT = "give the published files of image_generation, or write a PairReader for your own"


class GenAIBenchReader(ParquetPairReader):
    """Votes of TIGER-Lab's GenAI-Bench on pairs of generated images; the left image is a, the right one is b.

    A row of another or no vote is unlabelled, a null prompt is read as an empty one, and a null image cannot be read.
    An image is named by a hash of its bytes, so it keeps its name in all its rows. Duplicate rows are kept.

    Constructing a reader reads all columns but the images.

    Args:
        source: Folder with ``{split}-*.parquet``, itself or in ``image_generation/``; otherwise the id of a data set
            on the hub, whose configuration ``image_generation`` is downloaded.
        split: ``test`` or ``test_v1``.
        revision: Commit, tag or branch of the hub data set; pin it.
        both_bad: What ``bothbad_vote`` becomes: no image is preferred, so it is a ``tie`` (½) like ``tievote``, or
            it is left ``unlabelled``. :meth:`vote_types` tells the two kinds of tie apart.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`; under ``skip`` and
            ``placeholder`` a split with missing parts is read without them.

    Raises:
        InputError: If the split cannot be found, or lacks a part, a column or rows.
    """

    exif = "ignore"

    def __init__(
        self,
        source: str,
        split: str = "test",
        *,
        revision: str | None = None,
        both_bad: Literal["tie", "unlabelled"] = "tie",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        table = self.open_split(source, split, revision, COLUMNS, HINT, "image_generation")
        check_image_columns(self._parts, IMAGES, HINT)
        prompts, long = empty_long_prompts(self, table.column("prompt"), self._pair_id)
        self._rows = np.flatnonzero(~long) if self.on_error == "skip" else np.arange(len(long))
        self._index = table.set_column(0, "prompt", prompts).take(self._rows)
        self._images = RowGroupColumns(self._parts, IMAGES)
        labels = {kind: label for kind, label in VOTES.items() if both_bad == "tie" or kind != "bothbad_vote"}
        self._labels = np.array([labels.get(vote, np.nan) for vote in self.vote_types()], dtype=np.float64)
        self._labels[long[self._rows]] = np.nan
        if not len(self):
            raise InputError(f"split: {split!r} of {source} has no rows; check the files")
        if unlabelled := int(np.isnan(self._labels).sum()):
            self.remarks[f"unlabelled (vote_type is none of {', '.join(labels)})"] += unlabelled
        if nulls := self._index.column("prompt").null_count:
            self.remarks["null prompt read as empty"] += nulls
        self.report(f"{source} {split}")

    def __getitem__(self, index: int) -> PreferencePair:
        row, label = {name: self._index.column(name)[index].as_py() for name in COLUMNS}, float(self._labels[index])
        left, right = self._images.read(*locate(self._starts, int(self._rows[index])))
        return PreferencePair(
            pair_id=self._pair_id(int(self._rows[index])),
            prompt=row["prompt"] or "",
            image_a=embedded_image(left),
            image_b=embedded_image(right),
            label_a=None if np.isnan(label) else label,
            model_a=row["left_model"],
            model_b=row["right_model"],
            source="genai_bench_tiger",
            split=self.split,
        )

    def facts(self) -> dict[str, list[Any]]:
        """Models, and the vote as published, which tells good ties from bad ones."""
        names = {"model_a": "left_model", "model_b": "right_model", "vote": "vote_type"}
        return {name: self._index.column(column).to_pylist() for name, column in names.items()}

    def vote_types(self) -> list[str | None]:
        """``vote_type`` of every row as published: what a protocol needs that tells good ties from bad ones."""
        return self._index.column("vote_type").to_pylist()

    def prompts(self) -> list[str]:
        """Raw prompt of every row."""
        return [prompt or "" for prompt in self._index.column("prompt").to_pylist()]
