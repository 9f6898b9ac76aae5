"""From an image of any size to the size that a reward model looks at."""

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
"""Native side, in pixels, of the network that the published buckets are for."""


class ImageSizes(ABC):
    """A model's own rule for the sizes of images."""

    @abstractmethod
    def loader(self, height: int, width: int) -> PixelLoader:
        """What brings an image of ``height`` × ``width`` pixels to the model's size."""

    def fits(self, height: int, width: int) -> bool:
        """Whether training has a size for images of this shape; others come to the size of the nearest one."""
        return True


@dataclass(frozen=True)
class OneSize(ImageSizes):
    """Every image stretched to one size, bilinear, as LRM was trained (released code).

    Attributes:
        height: Pixels.
        width: Pixels.
    """

    height: int
    width: int

    def __str__(self) -> str:
        """Height × width."""
        return f"{self.height}x{self.width}"

    def loader(self, height: int, width: int) -> PixelLoader:
        """See :meth:`ImageSizes.loader`."""
        return PixelLoader(self.height, self.width, "stretch")


@dataclass(frozen=True)
class NearestBucket(ImageSizes):
    """The aspect bucket that training puts an image into; what hangs over is cut (DiNa-LRM's training sizes).

    See :func:`~latentreward.data.buckets.assign_bucket`. An image whose aspect ratio no bucket has, which training
    leaves out, comes to the bucket nearest in aspect. Images of any area have a bucket.

    Attributes:
        buckets: (height, width) of each, in pixels.
    """

    buckets: Sequence[tuple[int, int]] = tuple((*bucket,) for bucket in PUBLISHED_BUCKETS)

    def __str__(self) -> str:
        """The buckets."""
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
    """What images a backbone's network was trained on; None if it does not tell.

    A network that takes several shapes gets the published buckets, scaled from 1024 pixels to its native side and
    rounded to what VAE and patches divide; of buckets that become equal one stays.
    """
    if backbone.native_size is None:
        return None
    if not backbone.takes_aspects:
        return OneSize(*backbone.native_size)
    scale, multiple = max(backbone.native_size) / PUBLISHED_SIDE, backbone.side_multiple
    sizes = [tuple(max(round(side * scale / multiple), 1) * multiple for side in size) for size in PUBLISHED_BUCKETS]
    return NearestBucket(tuple(dict.fromkeys(sizes)))  # type: ignore[arg-type]
