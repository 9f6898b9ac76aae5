"""A reader's rows as decoded pairs, with bad images handled as the reader's ``on_error`` says."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentreward.contracts import PreferencePair
from latentreward.data.images import IMAGE_PROBLEMS, ExifOrientation, ImageError, PixelLoader
from latentreward.data.readers import PairReader
from latentreward.data.readers.base import DATA_ON_ERROR, OWN_ON_ERROR, OnError
from latentreward.errors import InputError

logger = logging.getLogger(__name__)

REMEDY = {
    "latents": "import them with `latentreward cache` and train on the cache",
    "nothing": "give a copy of the data set that has images",
}


@dataclass(frozen=True)
class LoadedPair:
    """A pair with its pixels.

    Attributes:
        pair: The reader's record.
        pixels_a: ``(3, H, W)`` in [-1, 1].
        pixels_b: Same shape.
    """

    pair: PreferencePair
    pixels_a: Tensor
    pixels_b: Tensor


@dataclass(frozen=True)
class SkippedPair:
    """What stands for a pair whose image could not be read: the batch is one pair smaller.

    Attributes:
        pair_id: Name of the pair.
        problem: One line.
    """

    pair_id: str
    problem: str


class PairDataset(Dataset[LoadedPair | SkippedPair]):
    """Map-style data set over rows of a reader.

    Args:
        reader: Where pairs come from; its ``on_error`` also rules over images that cannot be read.
        loader: Decodes and resizes one image; EXIF orientation is treated as the reader says.
        rows: Row numbers of the reader to offer; all by default.
        on_error: For a reader that has no ``on_error`` of its own.
        name: Of the split in a data module, for messages.

    Raises:
        InputError: If the reader has no images.
    """

    def __init__(
        self,
        reader: PairReader,
        loader: PixelLoader,
        rows: Sequence[int] | np.ndarray | None = None,
        on_error: OnError = "raise",
        name: str = "",
    ) -> None:
        if reader.holds != "images":
            raise InputError(
                f"{type(reader).__name__}: its rows hold {reader.holds}, no images; {REMEDY[reader.holds]}"
            )
        self.reader, self.loader, self.name = reader, replace(loader, exif=reader.exif), name
        self.on_error = reader.own_on_error or on_error
        self.rows = np.arange(len(reader)) if rows is None else np.asarray(rows)
        # 0 or 1 + number of the problem, per row; in shared memory, since images are decoded in worker processes
        self._problems = torch.zeros(len(self.rows), dtype=torch.uint8).share_memory_()
        self._warned = False

    @property
    def exif(self) -> ExifOrientation:
        """Whether images are turned upright by their EXIF orientation."""
        return self.loader.exif

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LoadedPair | SkippedPair:
        """Fetch, decode and resize the pair at position ``index`` of ``rows``.

        Raises:
            ImageError: If an image cannot be read and ``on_error`` is ``"raise"``.
        """
        pair = self.reader[int(self.rows[index])]
        try:
            return LoadedPair(pair, self.loader(pair.image_a), self.loader(pair.image_b))
        except ImageError as error:
            return self._replace(index, pair, error)

    def skipped(self) -> Counter[str]:
        """Pairs left out, or replaced by a placeholder, by reason; seen so far by this process and its workers."""
        counts = torch.bincount(self._problems, minlength=len(IMAGE_PROBLEMS) + 1).tolist()[1:]
        return Counter({problem: count for problem, count in zip(IMAGE_PROBLEMS, counts, strict=True) if count})

    def _replace(self, index: int, pair: PreferencePair, error: ImageError) -> LoadedPair | SkippedPair:
        split, setting = (f"data.{self.name}: ", DATA_ON_ERROR) if self.name else ("", OWN_ON_ERROR)
        if self.on_error == "raise":
            remedy = f"replace the file, or set {setting} to skip or placeholder"
            raise ImageError(f"{split}{pair.pair_id}: {error}; {remedy}", error.problem) from error
        self._problems[index] = 1 + IMAGE_PROBLEMS.index(error.problem)
        if not self._warned:
            self._warned = True
            logger.warning("%s%s: %s; this process only counts further ones", split, pair.pair_id, error)
        if self.on_error == "skip":
            return SkippedPair(pair.pair_id, str(error))
        return LoadedPair(replace(pair, label_a=None), self.loader.blank(), self.loader.blank())
