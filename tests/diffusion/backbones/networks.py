"""Backbones around the networks of ``tests.tiny_pipelines`` and inputs that fit them."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning
from latentreward.core.registry import create_backbone
from latentreward.diffusion import DiffusionBackbone, SD3DiTBackbone
from tests.tiny_pipelines import LATENTS, pipeline_folder

FACTORIES = {
    "sd15": "sd15",
    "sd21": "sd21",
    "sdxl": "sdxl",
    "sd3": "sd3_medium",
    "sd35": "sd35_medium",
    "sd35_no_t5": "sd35_medium",
}
DITS = ("sd3", "sd35")
T5_LENGTH = 6


_LOADED: dict[str, DiffusionBackbone] = {}


def tiny_backbone(name: str, **options: Any) -> DiffusionBackbone:
    """The backbone ``name`` from its tiny pipeline; DiTs read blocks 1 and 3 unless told.

    Adapters begin as after ``torch.manual_seed(0)``. One that was asked for before is copied: loading takes longer.
    """
    if name in ("sd3", "sd35", "sd35_no_t5"):
        options = {"visual_taps": (1, 3), "text_taps": (1, 3), "t5_length": T5_LENGTH, **options}
    key = f"{name} {sorted(options.items())}"
    if key not in _LOADED:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            source = pipeline_folder(name)
            _LOADED[key] = create_backbone(FACTORIES[name.removesuffix("_four_levels")], source=source, **options)
    return deepcopy(_LOADED[key])


def network_of(backbone: DiffusionBackbone) -> torch.nn.Module:
    return backbone.transformer if isinstance(backbone, SD3DiTBackbone) else backbone.unet


def inputs_of(
    backbone: DiffusionBackbone, batch: int = 2, shape: tuple[int, int] = (LATENTS, LATENTS)
) -> tuple[Tensor, Tensor, Conditioning]:
    """Random latents, timesteps that differ, random conditioning."""
    text = backbone.text_encoder
    return (
        torch.randn(batch, 4, *shape),
        backbone.noise_process.timesteps_at(torch.linspace(0.3, 0.8, batch)),
        Conditioning(torch.randn(batch, text.num_tokens, text.token_dim), torch.randn(batch, text.pooled_dim)),
    )
