"""Reader of held-out pairs of the tiny world."""

from pathlib import Path

from latentreward.data import PickAPicReader
from latentreward.tinyworld.writers import write_pickapic


class TinyWorldReader(PickAPicReader):
    """Reader of drawn pairs, ties included, whose captions are in no training split; the first use writes the files.

    Args:
        root: Folder of the parquet files.
        pairs: Number of pairs.
        seed: Seed of the pairs.

    Raises:
        ValueError: If ``root`` holds other files, or pairs of other settings.
    """

    def __init__(self, root: str = "runs/tinyworld/held_out", pairs: int = 400, seed: int = 0) -> None:
        super().__init__(str(write_pickapic(Path(root), {"test": pairs}, seed)), "test")
