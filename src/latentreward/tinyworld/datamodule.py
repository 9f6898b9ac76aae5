"""The tiny world's pairs as a data module that writes its own files."""

from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from latentreward.data import HPDv3Reader, PairReader, PickAPicReader, PreferenceDataModule
from latentreward.tinyworld.writers import write_hpdv3, write_pickapic


class TinyWorldDataModule(PreferenceDataModule):
    """Drawn preference pairs, 32 × 32, as real JPEG files in the layout of a real data set.

    The first run writes them under ``root``, later ones read them. From there on they go through the same reader as
    the real data set.

    Args:
        root: Folder of the files.
        layout: ``pickapic`` (parquet with JPEG bytes, ties) or ``hpdv3`` (JSON and JPEG files, no ties).
        train_pairs: Pairs to learn from.
        val_pairs: Held-out pairs, of other prompts.
        data_seed: Seed of the drawing.
        options: See :class:`PreferenceDataModule`.

    Raises:
        InputError: If ``root`` holds pairs of other settings.
    """

    def __init__(
        self,
        root: str = "runs/tinyworld/pickapic",
        layout: Literal["pickapic", "hpdv3"] = "pickapic",
        train_pairs: int = 6000,
        val_pairs: int = 1000,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        train: PairReader
        val: PairReader
        if layout == "pickapic":
            folder = write_pickapic(Path(root), {"train": train_pairs, "validation": val_pairs}, data_seed)
            # There are so few captions of one shape that, each counting once, they would hardly be learned from.
            train, val = (PickAPicReader(str(folder), split, weight="equal") for split in ("train", "validation"))
        else:
            folder = write_hpdv3(Path(root), {"train": train_pairs, "test": val_pairs}, data_seed)
            train, val = HPDv3Reader(str(folder), "train"), HPDv3Reader(str(folder), "test")
        super().__init__(32, train=train, val=val, predict=val, **options)

    def test_dataloader(self) -> DataLoader[Any]:
        """The held-out pairs again: nothing of the tiny world was chosen on them."""
        return self._evaluation_loader("val")
