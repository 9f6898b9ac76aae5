"""Readers of pairs of the tiny world, which write their own files."""

from pathlib import Path
from typing import Literal

from latentreward.core.contracts import PathText
from latentreward.data import PickAPicReader
from latentreward.tinyworld.pairs import Mixed
from latentreward.tinyworld.writers import write_generated, write_pickapic


class TinyWorldReader(PickAPicReader):
    """Reader of pairs of the tiny world in the layout of Pick-a-Pic; the first use writes the files.

    Args:
        root: Folder of the parquet files.
        pairs: Number of pairs.
        seed: Seed of the pairs.
        kind: ``drawn``: drawn pairs, ties included, whose captions are in no training split. ``generated``: pairs of
            such captions that the shipped pipelines sample, see
            :func:`~latentreward.tinyworld.writers.write_generated`. ``mixed``: drawn pairs of the training split, half
            of whose winners have less quality than the loser, and 40 % less alignment
            (:class:`~latentreward.tinyworld.pairs.Mixed`).
    """

    def __init__(
        self,
        root: PathText = "runs/tinyworld/held_out",
        pairs: int = 400,
        seed: int = 0,
        kind: Literal["drawn", "generated", "mixed"] = "drawn",
    ) -> None:
        split = "train" if kind == "mixed" else "test"
        if kind == "generated":
            folder = write_generated(Path(root), pairs, seed)
        else:
            folder = write_pickapic(Path(root), {split: pairs}, seed, Mixed() if kind == "mixed" else None)
        # In training, pairs count equally, as in TinyWorldDataModule.
        super().__init__(str(folder), split, weight="equal" if kind == "mixed" else "per_prompt")
