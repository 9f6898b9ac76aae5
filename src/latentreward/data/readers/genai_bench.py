"""Reader of TIGER-Lab's GenAI-Bench: parquet files with votes on pairs of generated images."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentreward.core.contracts import ImageRef
from latentreward.data.readers.rows import RowReader
from latentreward.data.readers.tables import Source, empty_long_prompts, open_table, source_name

VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
COLUMNS = {"prompt": pa.large_string(), "left_model": pa.string(), "right_model": pa.string(), "vote_type": pa.string()}
IMAGES = ("left_image", "right_image")
HINT = "give the published files of image_generation, or write a PairReader for your own"


class GenAIBenchReader(RowReader):
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
            label. :meth:`facts` returns the votes themselves.
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
        super().__init__("genai_bench_tiger", split, randomise_sides=False, seed=0, **options)
        self._rows = open_table(self, source, split, revision, "image_generation")
        index = self._rows.read_index(COLUMNS, HINT)
        self._rows.check_images(IMAGES, HINT)
        names = self._rows.row_names()
        prompts, long = empty_long_prompts(self, index.column("prompt"), names)
        labels = {kind: label for kind, label in VOTES.items() if both_bad == "tie" or kind != "bothbad_vote"}
        votes = index.column("vote_type").combine_chunks()
        label = pa.array([*labels.values()]).take(pc.index_in(votes, pa.array([*labels])))
        table = pa.table(
            {
                "pair_id": names,
                "prompt": prompts,
                "label": pc.if_else(pa.array(long), None, label),
                "vote": votes,
                "model_a": index.column("left_model"),
                "model_b": index.column("right_model"),
                "row": np.arange(len(long)),
            }
        )
        self.table = table.filter(pa.array(~long)) if self.on_error == "skip" else table
        self._rows.open_images(IMAGES)
        if unlabelled := self.table.column("label").null_count:
            self.remarks[f"unlabelled (vote_type is none of {', '.join(labels)})"] += unlabelled
        if nulls := self.table.column("prompt").null_count:
            self.remarks["null prompt read as empty"] += nulls
        name = source_name(source)
        self.report(f"{name} {split}", f"split: {split!r} of {name} has no rows; check the files")

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return the left and the right image of a row with their bytes."""
        return self.embedded_images(self._rows.read(row["row"]))
