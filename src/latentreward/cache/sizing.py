"""Which size an image is cached at, and which pairs have none."""

import math
from dataclasses import dataclass
from typing import Literal

from latentreward.contracts import LatentSpace
from latentreward.data.buckets import MIN_PIXELS, PUBLISHED_BUCKETS, Bucket, assign_bucket, sort_buckets
from latentreward.data.images import MAX_PIXELS, ResizePolicy
from latentreward.errors import InputError, check_at_least_one

CROSS_BUCKET_ASPECT = 0.05
"""Aspect ratios that differ by this share, or more, are too far apart to share a bucket."""

TOO_SMALL = "image below min_pixels"
NO_BUCKET = "image in no bucket"
OTHER_ASPECT = "images of different aspect ratio"
OTHER_BUCKET = "images in different buckets"
OTHER_SHAPE = "latents of different shapes"


@dataclass(frozen=True)
class ImageSettings:
    """How images come to the few sizes of a cache.

    With ``size``, every image comes to that one size. Otherwise an image goes to the bucket with its aspect ratio
    (within 3 %) that is nearest in area.

    Args:
        size: Pixels of a side, or (height, width), of every image; None for buckets.
        buckets: (height, width) of each bucket; None takes the 13 of the released diffusion-rm cache.
        resize: ``center_crop`` cuts what hangs over at both ends (3 % at most in a bucket) and resizes with a Lanczos
            filter; ``stretch`` resizes both axes on their own, bilinear, as LRM was trained.
        cross_bucket: A pair whose images fall into different buckets: ``shared`` caches both, if their aspect ratios
            differ by less than 5 %, once more in the bucket of their mean size, and drops the pair otherwise; ``drop``
            drops it.
        min_pixels: Pairs with a smaller image are left out; None takes 65,536 with buckets and no limit with ``size``.
        max_pixels: Images with more pixels count as unreadable; checked in their header.
    """

    size: int | tuple[int, int] | None = None
    buckets: tuple[tuple[int, int], ...] | None = None
    resize: ResizePolicy = "center_crop"
    cross_bucket: Literal["shared", "drop"] = "shared"
    min_pixels: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.size is not None and self.buckets is not None:
            raise InputError("images.size and images.buckets are both set; all images come to one size, or to buckets")
        if self.size is not None:
            check_at_least_one("images.", size=min(self.one_size()))

    def one_size(self) -> Bucket:
        """(height, width) of every image, where ``size`` is set."""
        assert self.size is not None
        return Bucket(self.size, self.size) if isinstance(self.size, int) else Bucket(*self.size)

    def bucket_sizes(self) -> tuple[Bucket, ...]:
        """The buckets by ascending area, where ``size`` is not set."""
        return PUBLISHED_BUCKETS if self.buckets is None else sort_buckets(self.buckets)

    def smallest(self) -> int:
        """``min_pixels`` with its default put in."""
        if self.min_pixels is None:
            return MIN_PIXELS if self.size is None else 0
        return self.min_pixels

    def needs_headers(self) -> bool:
        """Whether the size of an image must be known to plan for it."""
        return self.size is None or self.smallest() > 0

    def check(self, space: LatentSpace) -> None:
        """Refuse sizes that the VAE cannot make whole latents of.

        Raises:
            InputError: If a side is no multiple of the VAE's downscale.
        """
        sizes = self.bucket_sizes() if self.size is None else (self.one_size(),)
        for bucket in sizes:
            if bucket.height % space.downscale or bucket.width % space.downscale:
                name = "buckets" if self.size is None else "size"
                raise InputError(f"images.{name}: {bucket} is no multiple of the VAE's {space.downscale} pixels")

    def sizes_of_pair(self, a: Bucket | None, b: Bucket | None) -> tuple[Bucket, Bucket] | str:
        """The sizes at which the two images of a pair are cached, or why the pair is left out.

        Args:
            a: Bucket of the first image; None if ``needs_headers`` is false.
            b: Bucket of the second.
        """
        if a is not None and b is not None and min(a.area, b.area) < self.smallest():
            return TOO_SMALL
        if self.size is not None:
            return self.one_size(), self.one_size()
        assert a is not None and b is not None
        own = self._bucket(*a), self._bucket(*b)
        if own[0] is None or own[1] is None:
            return NO_BUCKET
        return (own[0], own[1]) if own[0] == own[1] else self._shared_bucket(a, b)

    def _shared_bucket(self, a: Bucket, b: Bucket) -> tuple[Bucket, Bucket] | str:
        if self.cross_bucket == "drop":
            return OTHER_BUCKET
        aspects = sorted((a.width / a.height, b.width / b.height))
        mean = self._bucket(round(math.sqrt(a.height * b.height)), round(math.sqrt(a.width * b.width)))
        return OTHER_ASPECT if mean is None or aspects[1] / aspects[0] - 1 >= CROSS_BUCKET_ASPECT else (mean, mean)

    def sizes_of_latents(self, a: Bucket, b: Bucket) -> tuple[Bucket, Bucket] | str:
        """The same for images that are latents already: nothing is resized, so each must have the size of a bucket.

        Args:
            a: Bucket in pixels of the first image.
            b: Bucket of the second.
        """
        if a != b:
            return OTHER_SHAPE
        if self.size is not None:
            return (a, b) if a == self.one_size() else NO_BUCKET
        return (a, b) if a in self.bucket_sizes() else NO_BUCKET

    def _bucket(self, height: int, width: int) -> Bucket | None:
        return assign_bucket(height, width, self.bucket_sizes(), min_pixels=self.smallest())
