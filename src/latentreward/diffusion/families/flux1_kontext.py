"""FLUX.1-Kontext: the network of FLUX.1-dev, trained to edit a picture.

The source's tokens follow those of the picture that is made. They are clean at every noise level, and told apart by the
first coordinate of their positions. Without a source the network makes pictures from text.
"""

from __future__ import annotations

from typing import Any

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.vae import SourceSize
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flux1 import Flux1

SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    (1024, 1024),
    *((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)
"""(width, height) in pixels of the sources that the model was trained on."""


class Flux1Kontext(Flux1):
    """Family of FLUX.1-Kontext-dev: as FLUX.1-dev, with one source or none."""

    name = "flux1_kontext"
    title = "FLUX.1-Kontext"
    sources = (0, 1)

    @property
    def model(self) -> str:
        return "FLUX.1-Kontext-dev"

    def source_size(self, height: int, width: int) -> SourceSize:
        """See :meth:`Family.source_size`; the size of :data:`SIZES` with the nearest aspect, which is not kept."""
        if height < self.side_multiple:
            raise InputError(
                f"the pipeline of {self.model} cannot edit a picture of {height} × {width} pixels; give one at least "
                f"{self.side_multiple} high, or set source_size: made"
            )
        aspect = (width // self.side_multiple) / (height // self.side_multiple)
        columns, rows = min(SIZES, key=lambda size: (abs(aspect - size[0] / size[1]), size))
        return SourceSize((rows, columns))

    @property
    def default_guidance(self) -> float | None:
        """See :attr:`Family.default_guidance`; that of the model's card."""
        return 2.5


@register_backbone
def flux1_kontext(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of FLUX.1-Kontext-dev (FLUX.1 [dev] Non-Commercial License)."""
    return load_family_backbone(source, "flux1_kontext", **options)
