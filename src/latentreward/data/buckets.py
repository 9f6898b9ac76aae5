"""Aspect buckets: the few image sizes that stand for all others, so that a batch has one shape."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from latentreward.errors import InputError

MIN_PIXELS = 256 * 256
ASPECT_TOLERANCE = 0.03


class Bucket(NamedTuple):
    """One size, in pixels.

    Attributes:
        height: Pixels, positive.
        width: Pixels, positive.
    """

    height: int
    width: int

    @property
    def area(self) -> int:
        """Pixels."""
        return self.height * self.width

    @property
    def log_aspect(self) -> float:
        """Natural logarithm of width / height."""
        return math.log(self.width / self.height)

    def __str__(self) -> str:
        """Height × width, as in ``1248x832``."""
        return f"{self.height}x{self.width}"


def sort_buckets(sizes: Sequence[tuple[int, int]]) -> tuple[Bucket, ...]:
    """Buckets by ascending area; of equal areas, the one given first stands first.

    Args:
        sizes: (height, width) of each bucket, in pixels.

    Raises:
        InputError: If there is none, one is not positive, or one occurs twice.
    """
    if not sizes:
        raise InputError("buckets: none given; give at least one [height, width]")
    for number, (height, width) in enumerate(sizes):
        if height < 1 or width < 1:
            raise InputError(f"buckets: [{height}, {width}] is no size; give positive pixels as [height, width]")
        if (height, width) in [(*size,) for size in sizes[:number]]:
            raise InputError(f"buckets: [{height}, {width}] is given twice; leave one out")
    return tuple(sorted((Bucket(height, width) for height, width in sizes), key=lambda bucket: bucket.area))


PUBLISHED_BUCKETS = sort_buckets(
    [
        (256, 256),
        (512, 512),
        (1024, 1024),
        (1248, 832),
        (1344, 896),
        (832, 1248),
        (896, 1344),
        (1024, 768),
        (768, 1024),
        (1472, 832),
        (832, 1472),
        (1152, 832),
        (832, 1152),
    ]
)
"""The buckets of the released diffusion-rm cache (DiNa-LRM, arXiv:2602.11146)."""


def assign_bucket(
    height: int,
    width: int,
    buckets: Sequence[Bucket] = PUBLISHED_BUCKETS,
    min_pixels: int = MIN_PIXELS,
) -> Bucket | None:
    """The bucket that an image is resized to: of those with its aspect ratio, the one nearest in log area.

    Args:
        height: Pixels of the image.
        width: Pixels of the image.
        buckets: Candidates, ascending by area; of two equally near ones the first is taken.
        min_pixels: Smaller images have no bucket.

    Returns:
        None if no bucket has the aspect ratio, or the image is too small.
    """
    if min(height, width) < 1 or height * width < min_pixels:
        return None
    log_aspect, log_area = math.log(width / height), math.log(height * width)
    fitting = [bucket for bucket in buckets if abs(log_aspect - bucket.log_aspect) <= ASPECT_TOLERANCE]
    return min(fitting, key=lambda bucket: abs(log_area - math.log(bucket.area)), default=None)


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket] = PUBLISHED_BUCKETS) -> Bucket:
    """The bucket of an image that must have one: :func:`assign_bucket`'s, else the one nearest in aspect, then in area.

    Args:
        height: Pixels of the image.
        width: Pixels of the image.
        buckets: Candidates, ascending by area.
    """
    assigned = assign_bucket(height, width, buckets, min_pixels=0)
    if assigned is not None:
        return assigned
    image = Bucket(height, width)
    return min(
        buckets,
        key=lambda bucket: (
            round(abs(bucket.log_aspect - image.log_aspect), 6),  # 3:2 and 6:4 are as near, but for rounding
            abs(math.log(bucket.area / image.area)),
        ),
    )
