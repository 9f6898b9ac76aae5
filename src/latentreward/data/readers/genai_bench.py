"""Reader of TIGER-Lab's GenAI-Bench: parquet files with votes on pairs of generated images."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from latentreward.contracts import PreferencePair
from latentreward.data.readers.parquet_store import empty_long_prompts
from latentreward.data.readers.tables import Source, TablePairReader, source_name
from latentreward.errors import InputError

VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
COLUMNS = {"prompt": pa.large_string(), "left_model": pa.string(), "right_model": pa.string(), "vote_type": pa.string()}
IMAGES = ("left_image", "right_image")
HINT = "give the published files of image_generation, or write a PairReader for your own"


class GenAIBenchReader(TablePairReader):
    """Reader of TIGER-Lab's GenAI-Bench, votes on pairs of generated images; the left image is a, the right one b.

    A row is unlabelled if its ``vote_type`` is null or not a known vote. A null prompt is read as an empty prompt, and
    a null image counts as unreadable. A row whose prompt is too long falls under ``on_error``. An image is named by a
    hash of its bytes, so that its name is equal in all rows. Duplicate rows are kept.

    The constructor reads all columns but the images.

    Args:
        source: Folder that holds ``{split}-*.parquet``, directly or in ``image_generation/``, or ``{split}.parquet``;
            one parquet file or a pattern of files; a folder that ``save_to_disk`` wrote; otherwise the id of a hub data
            set, whose configuration ``image_generation`` is downloaded. From Python also a ``Dataset`` or
            ``DatasetDict``.
        split: ``test`` or ``test_v1``.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        both_bad: Label for the vote ``bothbad_vote``: ``tie`` gives ½, as for ``tievote``; ``unlabelled`` gives no
            label. :meth:`vote_types` returns the votes themselves.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`. Under ``skip`` and
            ``placeholder`` a split with missing files is read without them.

    Raises:
        InputError: If the split cannot be found, or lacks a file, a column or rows.
    """

    exif = "ignore"

    def __init__(
        self,
        source: Source,
        split: str = "test",
        *,
        revision: str | None = None,
        both_bad: Literal["tie", "unlabelled"] = "tie",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        table = self.open_split(source, split, revision, COLUMNS, HINT, "image_generation")
        self._table.check_images(IMAGES, HINT)
        prompts, long = empty_long_prompts(self, table.column("prompt"), self._table.row_name)
        self._rows = np.flatnonzero(~long) if self.on_error == "skip" else np.arange(len(long))
        self._index = table.set_column(0, "prompt", prompts).take(self._rows)
        self._images = self._table.images(IMAGES)
        labels = {kind: label for kind, label in VOTES.items() if both_bad == "tie" or kind != "bothbad_vote"}
        self._labels = np.array([labels.get(vote, np.nan) for vote in self.vote_types()], dtype=np.float64)
        self._labels[long[self._rows]] = np.nan
        if not len(self):
            raise InputError(f"split: {split!r} of {source_name(source)} has no rows; check the files")
        if unlabelled := int(np.isnan(self._labels).sum()):
            self.remarks[f"unlabelled (vote_type is none of {', '.join(labels)})"] += unlabelled
        if nulls := self._index.column("prompt").null_count:
            self.remarks["null prompt read as empty"] += nulls
        self.report(f"{source_name(source)} {split}")

    def __getitem__(self, index: int) -> PreferencePair:
        row, label = {name: self._index.column(name)[index].as_py() for name in COLUMNS}, float(self._labels[index])
        left, right = self._images.read(*self._table.locate(int(self._rows[index])))
        return PreferencePair(
            pair_id=self._table.row_name(int(self._rows[index])),
            prompt=row["prompt"] or "",
            image_a=self._table.image(left),
            image_b=self._table.image(right),
            label_a=None if np.isnan(label) else label,
            model_a=row["left_model"],
            model_b=row["right_model"],
            source="genai_bench_tiger",
            split=self.split,
        )

    def facts(self) -> dict[str, list[Any]]:
        """Return models and the published ``vote_type`` of every row, see :meth:`PairReader.facts`."""
        names = {"model_a": "left_model", "model_b": "right_model", "vote": "vote_type"}
        return {name: self._index.column(column).to_pylist() for name, column in names.items()}

    def vote_types(self) -> list[str | None]:
        """Return the published ``vote_type`` of every row, for protocols that distinguish good from bad ties."""
        return self._index.column("vote_type").to_pylist()

    def prompts(self) -> list[str]:
        """Return the raw prompt of every row."""
        return [prompt or "" for prompt in self._index.column("prompt").to_pylist()]
