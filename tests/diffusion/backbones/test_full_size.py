"""The real configurations on the meta device: parameter counts before and after cutting, and feature widths."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from latentreward.apps.estimate.pipelines import PIPELINES
from latentreward.core.contracts import LatentSpace
from latentreward.diffusion import FlowMatching, SD3DiTBackbone, SDUNetBackbone, process_from_scheduler
from latentreward.reward import CLIPProjectionHead

DDPM = process_from_scheduler({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
SPACE_4, SPACE_16 = LatentSpace(4, 8, 0.18215), LatentSpace(16, 8, 1.5305, 0.0609)


def millions(network: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1)


@pytest.mark.parametrize(
    ("config", "before", "after", "joined", "grids"),
    [
        (PIPELINES["sd15"]["unet"], 859.5, 348.7, 320 + 640 + 1280 + 1280 + 1280, [64, 32, 16, 8, 8]),
        (PIPELINES["sdxl"]["unet"], 2567.5, 1243.4, 320 + 640 + 1280 + 1280, [128, 64, 32, 32]),
    ],
    ids=["SD1.5", "SDXL"],
)
def test_unet(config: dict, before: float, after: float, joined: int, grids: list[int]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        assert millions(unet) == before
        backbone = SDUNetBackbone(unet, DDPM, SPACE_4)
        assert millions(backbone) == after
        spec = backbone.feature_spec
        assert [tap.grid[0] for tap in spec.visual] == grids
        assert spec.temb_dim == 1280
        head = CLIPProjectionHead(spec, embed_dim=768)
    assert head.visual_projection.in_features == joined


def test_sd35_medium() -> None:
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(PIPELINES["sd35"]["transformer"])
        assert millions(transformer) == 2243.2
        backbone = SD3DiTBackbone(transformer, FlowMatching(), SPACE_16, num_layers=12)
    assert millions(backbone) == 1237.6
    spec = backbone.feature_spec
    assert {(tap.width, tap.grid) for tap in spec.visual} == {(1536, (64, 64))}
    assert (spec.temb_dim, spec.pooled_text_dim) == (1536, 2048)
