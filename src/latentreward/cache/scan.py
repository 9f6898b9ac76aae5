"""Scan of a reader for planning: the pair of each row, and the sizes of its images."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from zlib import crc32

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
"""Rows that a worker sends together."""
REMEDY = "replace the file, or set the reader's on_error to skip"


@dataclass(frozen=True)
class ScannedRow:
    """Pair in one row of a reader, with the sizes of its images but without their contents."""

    number: int  # index of the row in the reader
    pair: PreferencePair  # pair whose images have keys but no contents
    marks: tuple[int, int]  # checksums of the paths or bytes of the two images, to notice two images of one key
    sizes: tuple[Bucket, Bucket] | None = None  # in pixels; None if not needed, or with a problem
    problem: str | None = None  # why the row has to be left out; None if it can be cached


class RowScan(Dataset[ScannedRow]):
    """Data set of a reader's rows as :class:`ScannedRow`; image headers are read only if sizes are needed, no pixels.

    Args:
        reader: Reader of the pairs.
        images: Settings for the sizes of images, which tell whether sizes are needed.
        space: Space of the latents, if the reader holds latents instead of images.
    """

    def __init__(self, reader: PairReader, images: ImageSettings, space: LatentSpace) -> None:
        self.reader, self.images, self.space = reader, images, space

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> ScannedRow:
        """Scan row ``index``.

        Raises:
            ImageError: If an image's header cannot be read and the reader's ``on_error`` is ``"raise"``.
        """
        pair = self.reader[index]
        a, b = pair.image_a, pair.image_b
        marks = _mark_of(a), _mark_of(b)
        bare = replace(pair, image_a=ImageRef(a.image_key), image_b=ImageRef(b.image_key))
        try:
            if a.holds == "latents":
                return ScannedRow(index, bare, marks, (self._latents_size(a), self._latents_size(b)))
            if not self.images.needs_headers():
                return ScannedRow(index, bare, marks)
            limit, exif = self.images.max_pixels, self.reader.exif
            sizes = Bucket(*image_size(a, limit, exif)), Bucket(*image_size(b, limit, exif))
            return ScannedRow(index, bare, marks, sizes)
        except ImageError as error:
            if self.reader.on_error == "raise":
                raise ImageError(f"{pair.pair_id}: {error}; {REMEDY}", error.problem) from error
            return ScannedRow(index, bare, marks, problem=error.problem)

    def _latents_size(self, image: ImageRef) -> Bucket:
        *_, height, width = shape = decode_latents(image, self.space.frame_downscale is not None).shape
        size = Bucket(height * self.space.downscale, width * self.space.downscale)
        if shape != self.space.shape(*size, self.images.frames):
            problem = f"shape {shape}, but the latent space has [{self.space}]"
            raise ImageError(f"latents {image.image_key!r}: {problem}; correct encoder.latent_space", DAMAGED)
        return size


def _mark_of(image: ImageRef) -> int:
    data = image.data or b""
    return crc32(bytes(data[-4096:]), len(data)) if image.path is None else crc32(os.fsencode(image.path))


def scan_rows(scan: RowScan, num_workers: int) -> Iterator[ScannedRow]:
    """Yield all rows in their order, read by ``num_workers`` processes."""
    loader = WorkerLoader(
        scan,
        batch_size=ROWS_AT_ONCE,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else torch draws a seed from the global generator
    )
    for rows in loader:
        yield from rows
