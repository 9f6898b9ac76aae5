"""What planning has to know of each row of a reader: its pair, and the sizes of its images."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from latentreward.cache.sizing import ImageSettings
from latentreward.contracts import ImageRef, LatentSpace, PreferencePair
from latentreward.data.buckets import Bucket
from latentreward.data.images import DAMAGED, ImageError, image_size
from latentreward.data.latents import decode_latents
from latentreward.data.loading import WorkerLoader
from latentreward.data.readers import PairReader

ROWS_AT_ONCE = 64
REMEDY = "replace the file, or set the reader's on_error to skip"


@dataclass(frozen=True)
class ScannedRow:
    """One row of a reader, without the bytes of its images.

    Attributes:
        number: Row number of the reader.
        pair: Its record; its images are names alone.
        sizes: Pixels of the two images; None if they are not needed, or an image has none.
        problem: Why the row has to be left out; None if it need not.
    """

    number: int
    pair: PreferencePair
    sizes: tuple[Bucket, Bucket] | None = None
    problem: str | None = None


class RowScan(Dataset[ScannedRow]):
    """Rows of a reader as :class:`ScannedRow`: headers of images are read, but no pixels.

    Args:
        reader: Rows.
        images: Says whether the sizes of images matter.
        space: Space of latents, where the reader holds latents instead of images.
    """

    def __init__(self, reader: PairReader, images: ImageSettings, space: LatentSpace) -> None:
        self.reader, self.images, self.space = reader, images, space

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> ScannedRow:
        """Row ``index``.

        Raises:
            ImageError: If a header cannot be read and the reader's ``on_error`` is ``"raise"``.
        """
        pair = self.reader[index]
        a, b = pair.image_a, pair.image_b
        bare = replace(pair, image_a=ImageRef(a.image_key), image_b=ImageRef(b.image_key))
        try:
            if a.holds == "latents":
                return ScannedRow(index, bare, (self._latents_size(a), self._latents_size(b)))
            if not self.images.needs_headers():
                return ScannedRow(index, bare)
            limit, exif = self.images.max_pixels, self.reader.exif
            return ScannedRow(index, bare, (Bucket(*image_size(a, limit, exif)), Bucket(*image_size(b, limit, exif))))
        except ImageError as error:
            if self.reader.on_error == "raise":
                raise ImageError(f"{pair.pair_id}: {error}; {REMEDY}", error.problem) from error
            return ScannedRow(index, bare, problem=error.problem)

    def _latents_size(self, image: ImageRef) -> Bucket:
        channels, height, width = decode_latents(image).shape
        if channels != self.space.channels:
            problem = f"{channels} channels, but the latent space has [{self.space}]"
            raise ImageError(f"latents {image.image_key!r}: {problem}; correct encoder.latent_space", DAMAGED)
        return Bucket(height * self.space.downscale, width * self.space.downscale)


def scan_rows(scan: RowScan, num_workers: int) -> Iterator[ScannedRow]:
    """All rows in their order, read by worker processes."""
    loader = WorkerLoader(
        scan,
        batch_size=ROWS_AT_ONCE,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else torch draws a seed from the global generator
    )
    for rows in loader:
        yield from rows
