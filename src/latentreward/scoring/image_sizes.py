"""From an image of any size to the size that a reward model looks at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentreward.data.buckets import PUBLISHED_BUCKETS, Bucket
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
    """The aspect bucket nearest in shape, then in area; what hangs over is cut (DiNa-LRM's training sizes).

    Attributes:
        buckets: (height, width) of each, in pixels.
    """

    buckets: Sequence[tuple[int, int]] = tuple((*bucket,) for bucket in PUBLISHED_BUCKETS)

    def __str__(self) -> str:
        """The buckets."""
        return " ".join(f"{height}x{width}" for height, width in self.buckets)

    def loader(self, height: int, width: int) -> PixelLoader:
        """See :meth:`ImageSizes.loader`."""
        image = Bucket(height, width)
        buckets = [Bucket(*size) for size in self.buckets]
        best = min(buckets, key=lambda b: (round(abs(b.log_aspect - image.log_aspect), 6), abs(b.area - image.area)))
        return PixelLoader(best.height, best.width, "center_crop")


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
