"""Buckets of sizes, and rules by which images of any size are resized, in training and in scoring."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from latentreward.core.errors import InputError
from latentreward.data.clips import FPS, ClipLoader
from latentreward.data.images import PixelLoader, ResizePolicy

MIN_PIXELS = 256 * 256
ASPECT_TOLERANCE = 0.03


class Bucket(NamedTuple):
    """An image size in pixels."""

    height: int  # pixels, positive
    width: int  # pixels, positive

    @property
    def area(self) -> int:
        """Return height × width in pixels."""
        return self.height * self.width

    @property
    def log_aspect(self) -> float:
        """Return the natural logarithm of width / height."""
        return math.log(self.width / self.height)

    def __str__(self) -> str:
        """Return ``HEIGHTxWIDTH``, e.g. ``1248x832``."""
        return f"{self.height}x{self.width}"


def sort_buckets(sizes: Sequence[tuple[int, int]]) -> tuple[Bucket, ...]:
    """Return the distinct buckets of (height, width) in pixels by area; those of equal area keep their order."""
    if not sizes:
        raise InputError("buckets: none given; give at least one [height, width]")
    for height, width in sizes:
        if height < 1 or width < 1:
            raise InputError(f"buckets: [{height}, {width}] is not a size; give positive pixels as [height, width]")
    return tuple(
        sorted(dict.fromkeys(Bucket(height, width) for height, width in sizes), key=lambda bucket: bucket.area)
    )


SQUARE = [(256, 256), (512, 512), (1024, 1024)]
TALL = [(1248, 832), (1344, 896), (1024, 768), (1472, 832), (1152, 832)]
PUBLISHED_BUCKETS = sort_buckets([*SQUARE, *(size for tall in TALL for size in (tall, tall[::-1]))])
"""Buckets of the released diffusion-rm cache (DiNa-LRM, arXiv:2602.11146), by ascending area."""


def assign_bucket(
    height: int, width: int, buckets: Sequence[Bucket] = PUBLISHED_BUCKETS, min_pixels: int = MIN_PIXELS
) -> Bucket | None:
    """Find the bucket to resize an image to: among buckets with its aspect ratio, the one nearest in log area.

    Aspect ratios count as equal if their natural logarithms differ by at most ``ASPECT_TOLERANCE``. Buckets are given
    by ascending area; of two equally near ones the first is taken. The result is None if no bucket has the image's
    aspect ratio, or the image has less than ``min_pixels``.
    """
    if min(height, width) < 1 or height * width < min_pixels:
        return None
    log_aspect, log_area = math.log(width / height), math.log(height * width)
    fitting = [bucket for bucket in buckets if abs(log_aspect - bucket.log_aspect) <= ASPECT_TOLERANCE]
    return min(fitting, key=lambda bucket: abs(log_area - math.log(bucket.area)), default=None)


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket] = PUBLISHED_BUCKETS) -> Bucket:
    """Find a bucket for any image: that of :func:`assign_bucket`, else the nearest in log aspect ratio, then area."""
    image = Bucket(height, width)

    def distance(bucket: Bucket) -> tuple[float, float]:
        aspect = round(abs(bucket.log_aspect - image.log_aspect), 6)  # else rounding errors tell 3:2 and 6:4 apart
        return aspect, abs(math.log(bucket.area / image.area))

    return assign_bucket(height, width, buckets, min_pixels=0) or min(buckets, key=distance)


class ImageSizes(ABC):
    """Base class of the rules by which images are resized."""

    frames: int = 1  # number of frames of clips; 1 for images

    @abstractmethod
    def loader(self, height: int, width: int) -> PixelLoader:
        """Return the transform that resizes an image of ``height`` × ``width`` pixels to the model's size."""

    def fits(self, height: int, width: int) -> bool:
        """Tell whether training accepts images of this shape; scoring resizes others to the nearest training size."""
        return True


@dataclass(frozen=True)
class OneSize(ImageSizes):
    """Rule that resizes every image to one size."""

    height: int  # pixels
    width: int  # pixels
    resize: ResizePolicy = "stretch"  # see :class:`~latentreward.data.PixelLoader`; LRM stretches
    frames: int = 1  # number of frames of clips; 1 for images
    fps: float = FPS  # frames per second of clips

    def __str__(self) -> str:
        """Return the size as ``HEIGHTxWIDTH``, ``center-cropped`` if images are not stretched, and that of clips."""
        resized = "" if self.resize == "stretch" else " center-cropped"
        clips = "" if self.frames == 1 else f", clips of {self.frames} frames at {self.fps:g} per second"
        return f"{self.height}x{self.width}{resized}{clips}"

    def loader(self, height: int, width: int) -> PixelLoader:
        sizes = self.height, self.width, self.resize
        return PixelLoader(*sizes) if self.frames == 1 else ClipLoader(*sizes, frames=self.frames, fps=self.fps)


@dataclass(frozen=True)
class NearestBucket(ImageSizes):
    """Rule that resizes an image to the size of its aspect ratio bucket (DiNa-LRM), see :func:`assign_bucket`.

    Training leaves out an image whose aspect ratio is too far from all buckets, or that is too small; scoring takes
    the nearest one.
    """

    buckets: Sequence[tuple[int, int]] = tuple((*bucket,) for bucket in PUBLISHED_BUCKETS)  # (height, width) in pixels
    resize: ResizePolicy = "center_crop"  # see :class:`~latentreward.data.PixelLoader`

    def __str__(self) -> str:
        """Return the buckets as ``HEIGHTxWIDTH``, followed by ``stretched`` if images are not cropped."""
        sizes = " ".join(f"{height}x{width}" for height, width in self.buckets)
        return sizes + ("" if self.resize == "center_crop" else " stretched")

    def loader(self, height: int, width: int) -> PixelLoader:
        return PixelLoader(*nearest_bucket(height, width, self._sorted()), self.resize)

    def fits(self, height: int, width: int) -> bool:
        return assign_bucket(height, width, self._sorted(), min_pixels=0) is not None

    def _sorted(self) -> tuple[Bucket, ...]:
        return sort_buckets(self.buckets)
