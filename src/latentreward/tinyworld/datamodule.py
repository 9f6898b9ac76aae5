"""Data module of the tiny world's preference pairs, which writes its own files."""

from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from latentreward.data import HPDv3Reader, PairReader, PickAPicReader, PreferenceDataModule
from latentreward.tinyworld.writers import write_hpdv3, write_pickapic


class TinyWorldDataModule(PreferenceDataModule):
    """Data module of drawn preference pairs, 32 × 32 pixels, stored in the layout of a real data set.

    The first run writes the pairs under ``root``; later runs read the files. The files are read by the reader of the
    real data set.

    Args:
        root: Folder of the files.
        layout: ``pickapic`` (parquet with JPEG bytes, with ties) or ``hpdv3`` (JSON and JPEG files, no ties).
        train_pairs: Number of training pairs.
        val_pairs: Number of validation pairs, whose prompts are not in the training pairs.
        data_seed: Seed of the pairs.
        options: See :class:`PreferenceDataModule`.

    Raises:
        ValueError: If ``root`` holds pairs of other settings.
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
            # Pairs count equally: with equal weight per prompt, the few captions of single shapes would hardly count.
            train, val = (PickAPicReader(str(folder), split, weight="equal") for split in ("train", "validation"))
        else:
            folder = write_hpdv3(Path(root), {"train": train_pairs, "test": val_pairs}, data_seed)
            train, val = HPDv3Reader(str(folder), "train"), HPDv3Reader(str(folder), "test")
        super().__init__(32, train=train, val=val, predict=val, **options)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the validation pairs, which no setting of the tiny world was chosen on."""
        return self._evaluation_loader("val")
