"""Rules by which images of any size are resized, in training and in scoring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from latentreward.data.buckets import PUBLISHED_BUCKETS, Bucket, assign_bucket, nearest_bucket, sort_buckets
from latentreward.data.clips import FPS, ClipLoader
from latentreward.data.images import PixelLoader, ResizePolicy


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
    """Rule that resizes an image to the size of its aspect ratio bucket (DiNa-LRM).

    The bucket is the one that training uses, see :func:`~latentreward.data.buckets.assign_bucket`. Training leaves out
    an image whose aspect ratio is too far from all buckets; scoring takes the bucket with the nearest aspect ratio.
    Unlike training, scoring accepts images of any area.
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
        return sort_buckets(tuple(dict.fromkeys((height, width) for height, width in self.buckets)))
