"""Rules by which images of any size are resized, in training and in scoring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from latentreward.data.buckets import PUBLISHED_BUCKETS, Bucket, assign_bucket, nearest_bucket, sort_buckets
from latentreward.data.clips import FPS, ClipLoader
from latentreward.data.images import PixelLoader, ResizePolicy


class ImageSizes(ABC):
    """Base class of the rules by which images are resized.

    Attributes:
        frames: Number of frames of clips; 1 for images.
    """

    frames: int = 1

    @abstractmethod
    def loader(self, height: int, width: int) -> PixelLoader:
        """Return the transform that resizes an image of ``height`` × ``width`` pixels to the model's size."""

    def fits(self, height: int, width: int) -> bool:
        """Tell whether training accepts images of this shape; scoring resizes others to the nearest training size."""
        return True


@dataclass(frozen=True)
class OneSize(ImageSizes):
    """Rule that resizes every image to one size.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        resize: How images are resized, see :class:`~latentreward.data.images.PixelLoader`. LRM's released code
            stretches them.
        frames: Number of frames of clips; 1 for images.
        fps: Frames per second of clips.
    """

    height: int
    width: int
    resize: ResizePolicy = "stretch"
    frames: int = 1
    fps: float = FPS

    def __str__(self) -> str:
        """Return the size as ``HEIGHTxWIDTH``, ``center-cropped`` if images are not stretched, and that of clips."""
        resized = "" if self.resize == "stretch" else " center-cropped"
        return f"{self.height}x{self.width}{resized}{self.clips}"

    @property
    def clips(self) -> str:
        """Number of frames and frames per second in words; empty for images."""
        return "" if self.frames == 1 else f", clips of {self.frames} frames at {self.fps:g} per second"

    def loader(self, height: int, width: int) -> PixelLoader:
        """See :meth:`ImageSizes.loader`."""
        sizes = self.height, self.width, self.resize
        return PixelLoader(*sizes) if self.frames == 1 else ClipLoader(*sizes, frames=self.frames, fps=self.fps)


@dataclass(frozen=True)
class NearestBucket(ImageSizes):
    """Rule that resizes an image to the size of its aspect ratio bucket (DiNa-LRM).

    The bucket is the one that training uses, see :func:`~latentreward.data.buckets.assign_bucket`. Training leaves out
    an image whose aspect ratio is too far from all buckets; scoring takes the bucket with the nearest aspect ratio.
    Unlike training, scoring accepts images of any area.

    Attributes:
        buckets: (height, width) of each bucket, in pixels.
        resize: How images are resized, see :class:`~latentreward.data.images.PixelLoader`.
    """

    buckets: Sequence[tuple[int, int]] = tuple((*bucket,) for bucket in PUBLISHED_BUCKETS)
    resize: ResizePolicy = "center_crop"

    def __str__(self) -> str:
        """Return the buckets as ``HEIGHTxWIDTH``, followed by ``stretched`` if images are not cropped."""
        sizes = " ".join(f"{height}x{width}" for height, width in self.buckets)
        return sizes + ("" if self.resize == "center_crop" else " stretched")

    def loader(self, height: int, width: int) -> PixelLoader:
        """See :meth:`ImageSizes.loader`."""
        return PixelLoader(*nearest_bucket(height, width, self._sorted()), self.resize)

    def fits(self, height: int, width: int) -> bool:
        """See :meth:`ImageSizes.fits`."""
        return assign_bucket(height, width, self._sorted(), min_pixels=0) is not None

    def _sorted(self) -> tuple[Bucket, ...]:
        return sort_buckets(tuple(dict.fromkeys((height, width) for height, width in self.buckets)))
