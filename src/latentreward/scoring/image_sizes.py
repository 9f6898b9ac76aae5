"""Rules by which a reward model resizes images of any size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentreward.data.buckets import PUBLISHED_BUCKETS, Bucket, assign_bucket, nearest_bucket, sort_buckets
from latentreward.data.images import PixelLoader

if TYPE_CHECKING:
    from latentreward.backbones.base import DiffusionBackbone

PUBLISHED_SIDE = 1024
"""Native side, in pixels, of the network for which DiNa-LRM's buckets were published."""


class ImageSizes(ABC):
    """Base class of the rules by which a reward model resizes images."""

    @abstractmethod
    def loader(self, height: int, width: int) -> PixelLoader:
        """Return the transform that resizes an image of ``height`` × ``width`` pixels to the model's size."""

    def fits(self, height: int, width: int) -> bool:
        """Tell whether training accepts images of this shape; scoring resizes others to the nearest training size."""
        return True


@dataclass(frozen=True)
class OneSize(ImageSizes):
    """Rule that stretches every image to one size, with bilinear interpolation, as LRM's released code does.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
    """

    height: int
    width: int

    def __str__(self) -> str:
        """Return the size as ``HEIGHTxWIDTH``."""
        return f"{self.height}x{self.width}"

    def loader(self, height: int, width: int) -> PixelLoader:
        """See :meth:`ImageSizes.loader`."""
        return PixelLoader(self.height, self.width, "stretch")


@dataclass(frozen=True)
class NearestBucket(ImageSizes):
    """Rule that resizes an image to cover the size of its aspect ratio bucket, and center-crops the rest (DiNa-LRM).

    The bucket is the one that training uses, see :func:`~latentreward.data.buckets.assign_bucket`. Training leaves out
    an image whose aspect ratio is too far from all buckets; scoring takes the bucket with the nearest aspect ratio.
    Unlike training, scoring accepts images of any area.

    Attributes:
        buckets: (height, width) of each bucket, in pixels.
    """

    buckets: Sequence[tuple[int, int]] = tuple((*bucket,) for bucket in PUBLISHED_BUCKETS)

    def __str__(self) -> str:
        """Return the buckets, separated by spaces, each as ``HEIGHTxWIDTH``."""
        return " ".join(f"{height}x{width}" for height, width in self.buckets)

    def loader(self, height: int, width: int) -> PixelLoader:
        """See :meth:`ImageSizes.loader`."""
        return PixelLoader(*nearest_bucket(height, width, self._sorted()), "center_crop")

    def fits(self, height: int, width: int) -> bool:
        """See :meth:`ImageSizes.fits`."""
        return assign_bucket(height, width, self._sorted(), min_pixels=0) is not None

    def _sorted(self) -> tuple[Bucket, ...]:
        return sort_buckets(tuple(dict.fromkeys((height, width) for height, width in self.buckets)))


def own_sizes(backbone: DiffusionBackbone) -> ImageSizes | None:
    """Return the default rule for a backbone's image sizes; None if its native size is unknown.

    A network trained on one aspect ratio gets :class:`OneSize` with its native size. Any other network gets DiNa-LRM's
    buckets, scaled from 1024 pixels to the network's native side and rounded to multiples of ``side_multiple``; buckets
    that become equal are merged.
    """
    if backbone.native_size is None:
        return None
    if not backbone.takes_aspects:
        return OneSize(*backbone.native_size)
    scale, multiple = max(backbone.native_size) / PUBLISHED_SIDE, backbone.side_multiple
    sizes = [tuple(max(round(side * scale / multiple), 1) * multiple for side in size) for size in PUBLISHED_BUCKETS]
    return NearestBucket(tuple(dict.fromkeys(sizes)))  # type: ignore[arg-type]
