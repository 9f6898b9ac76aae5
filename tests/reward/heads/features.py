"""Random features for any spec."""

from math import prod

import torch

from latentreward.core.contracts import Features, FeatureSpec, TapSpec

UNET_SPEC = FeatureSpec(
    visual=(TapSpec(8, (8, 8)), TapSpec(16, (4, 4)), TapSpec(24, (2, 2)), TapSpec(24, (2, 2))),
    text=(TapSpec(20, (5,)),),
    temb_dim=12,
    pooled_text_dim=20,
)
DIT_SPEC = FeatureSpec(
    visual=(TapSpec(16, (4, 4)),) * 3, text=(TapSpec(16, (7,)),) * 2, temb_dim=16, pooled_text_dim=10
)
VIDEO_SPEC = FeatureSpec(
    visual=(TapSpec(8, (3, 4, 4)), TapSpec(16, (3, 2, 2))), text=(), temb_dim=6, pooled_text_dim=10
)
SPECS = {"unet": UNET_SPEC, "dit": DIT_SPEC, "video": VIDEO_SPEC}


def random_features(
    spec: FeatureSpec, batch: int = 3, uncond: bool = False, dtype: torch.dtype = torch.float32
) -> Features:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape).to(dtype)

    return Features(
        visual=tuple(draw(prod(tap.grid), tap.width) for tap in spec.visual),
        visual_grids=tuple(tap.grid for tap in spec.visual),
        text=tuple(draw(tap.grid[0], tap.width) for tap in spec.text),
        pooled_text=draw(spec.pooled_text_dim),
        temb=draw(spec.temb_dim),
        uncond=random_features(spec, batch, dtype=dtype) if uncond else None,
    )
