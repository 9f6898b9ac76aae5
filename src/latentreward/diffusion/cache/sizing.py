"""Choice of the size at which an image is cached, and of the pairs that are left out."""

import math
from dataclasses import dataclass
from typing import Literal

from latentreward.core.errors import InputError, check_at_least_one, check_multiples
from latentreward.data.buckets import MIN_PIXELS, PUBLISHED_BUCKETS, Bucket, assign_bucket, sort_buckets
from latentreward.data.clips import FPS, check_clips, require_pyav
from latentreward.data.images import MAX_PIXELS, ResizePolicy

CROSS_BUCKET_ASPECT = 0.05
"""Relative difference of two aspect ratios from which two images cannot share a bucket."""

TOO_SMALL = "image below min_pixels"
NO_BUCKET = "image in no bucket"
OTHER_ASPECT = "images of different aspect ratio"
OTHER_BUCKET = "images in different buckets"
OTHER_SHAPE = "latents of different shapes"
"""Reasons why a pair is left out."""


@dataclass(frozen=True)
class ImageSettings:
    """Settings for the sizes to which images are resized before they are encoded.

    With ``size``, every image is resized to that size. Otherwise, an image is resized to one of several bucket sizes:
    among the buckets whose aspect ratio differs from the image's by at most 3 %, the bucket nearest in area. A pair
    with an image that fits no bucket is left out.

    Args:
        size: Side in pixels, or (height, width), of every image; None for buckets.
        buckets: (height, width) of each bucket; None takes the 13 buckets of the released diffusion-rm cache.
        resize: ``center_crop`` crops both ends of the axis that is too long for the aspect ratio (by at most 3 % for a
            bucket) and resizes with a Lanczos filter. ``stretch`` resizes both axes independently, bilinear, as in
            LRM's training.
        cross_bucket: Treatment of a pair whose images fall into different buckets. ``shared`` caches both images at one
            common size for this pair, the bucket of their mean size, and drops the pair if their aspect ratios differ
            by 5 % or more or no bucket fits. ``drop`` drops the pair.
        min_pixels: Smallest number of pixels of an image; pairs with a smaller image are left out. None takes 65,536
            with buckets and no limit with ``size``.
        max_pixels: Largest number of pixels in an image's header; larger images count as unreadable.
        frames: Number of frames of clips, whose files are mp4 files; needs ``size``. 1 for images.
        fps: Frames per second of clips, see :class:`~latentreward.data.clips.ClipLoader`.
    """

    size: int | tuple[int, int] | None = None
    buckets: tuple[tuple[int, int], ...] | None = None
    resize: ResizePolicy = "center_crop"
    cross_bucket: Literal["shared", "drop"] = "shared"
    min_pixels: int | None = None
    max_pixels: int = MAX_PIXELS
    frames: int = 1
    fps: float = FPS

    def __post_init__(self) -> None:
        check_clips("images.", self.frames, self.fps)
        require_pyav(self.frames)
        if self.frames > 1 and self.needs_headers():
            raise InputError(
                f"images.frames={self.frames}: clips come to one size, whatever theirs; set images.size, and leave "
                "buckets and min_pixels out"
            )
        if self.size is not None and self.buckets is not None:
            raise InputError("images.size and images.buckets are both set; all images come to one size, or to buckets")
        if self.size is not None:
            check_at_least_one("images.", size=min(self.one_size()))

    def one_size(self) -> Bucket:
        """Return the (height, width) of every image; for settings with ``size`` only."""
        assert self.size is not None
        return Bucket(self.size, self.size) if isinstance(self.size, int) else Bucket(*self.size)

    def bucket_sizes(self) -> tuple[Bucket, ...]:
        """Return the buckets by ascending area; for settings without ``size``."""
        return PUBLISHED_BUCKETS if self.buckets is None else sort_buckets(self.buckets)

    def smallest(self) -> int:
        """Return ``min_pixels``, or its default if None."""
        if self.min_pixels is None:
            return MIN_PIXELS if self.size is None else 0
        return self.min_pixels

    def needs_headers(self) -> bool:
        """Tell whether planning needs the sizes of images, which are read from their headers."""
        return self.size is None or self.smallest() > 0

    def check(self, multiple: int) -> None:
        """Check that the model takes all sizes.

        Raises:
            InputError: If a side is not a multiple of ``multiple`` pixels.
        """
        sizes = self.bucket_sizes() if self.size is None else (self.one_size(),)
        for bucket in sizes:
            name = f"images.buckets: {bucket}" if self.size is None else "images.size"
            check_multiples(name, bucket, multiple)

    def sizes_of_pair(self, a: Bucket | None, b: Bucket | None) -> tuple[Bucket, Bucket] | str:
        """Return the sizes at which the two images of a pair are cached, or the reason why the pair is left out.

        Args:
            a: Height and width in pixels of the first image; None if :meth:`needs_headers` is false.
            b: Height and width in pixels of the second image, or None as for ``a``.
        """
        if a is not None and b is not None and min(a.area, b.area) < self.smallest():
            return TOO_SMALL
        if self.size is not None:
            return self.one_size(), self.one_size()
        assert a is not None and b is not None
        own = self._bucket(*a), self._bucket(*b)
        if own[0] is None or own[1] is None:
            return NO_BUCKET
        if own[0] == own[1]:
            return own[0], own[1]
        if self.cross_bucket == "drop":
            return OTHER_BUCKET
        aspects = sorted((a.width / a.height, b.width / b.height))
        mean = self._bucket(round(math.sqrt(a.height * b.height)), round(math.sqrt(a.width * b.width)))
        return OTHER_ASPECT if mean is None or aspects[1] / aspects[0] - 1 >= CROSS_BUCKET_ASPECT else (mean, mean)

    def sizes_of_latents(self, a: Bucket, b: Bucket, *sources: Bucket) -> tuple[Bucket, Bucket] | str:
        """Return the sizes of a pair whose images are stored as latents, or the reason why the pair is left out.

        Latents are not resized, so that all must have the same size: ``size``, or the size of a bucket.
        """
        if {b, *sources} != {a}:
            return OTHER_SHAPE
        if self.size is not None:
            return (a, b) if a == self.one_size() else NO_BUCKET
        return (a, b) if a in self.bucket_sizes() else NO_BUCKET

    def _bucket(self, height: int, width: int) -> Bucket | None:
        return assign_bucket(height, width, self.bucket_sizes(), min_pixels=self.smallest())
