"""Reward models around tiny networks with random weights, and images for them."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentreward.core.registry import create_backbone
from latentreward.data.image_sizes import OneSize
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead, PublishedSettings, RewardModel
from latentreward.reward.scoring.importers import PublishedDiNaLRM, PublishedLRM
from tests.diffusion.backbones.networks import tiny_backbone
from tests.diffusion.families.twins import TWINS

PROMPTS = ["a cat", "a dog", "a cat", "", "a red square left of a blue circle", "a dog"]


class ForeignHead(CLIPProjectionHead):
    """A head that latentreward does not export."""


def scoring_model(name: str) -> RewardModel:
    """LRM on a U-Net (``sd15``, ``sdxl``) or DiNa-LRM on a transformer (``sd3``, ``sd35``), every weight at work."""
    torch.manual_seed(0)
    backbone = tiny_backbone(name)
    spec = backbone.feature_spec
    head = CLIPProjectionHead(spec) if name.startswith("sd1") or name == "sdxl" else GatedQFormerHead(spec, num_heads=2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return RewardModel(backbone, head).eval().requires_grad_(False)


def edit_reward(**options: Any) -> RewardModel:
    """Reward of edits on a tiny FLUX.2-klein, which takes any number of pictures to edit, at 32 × 48 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("flux2_klein", source=TWINS["klein_base"].folder, visual_taps=(1, 2), text_taps=(1,))
        head = GatedQFormerHead(backbone.feature_spec, num_heads=2)
    model = RewardModel(backbone, head, **options).eval().requires_grad_(False)
    model.image_sizes = OneSize(32, 48)
    return model


def picture(seed: int, height: int = 24, width: int = 24) -> Image.Image:
    """Random pixels, enlarged, so that resizing does not grey them."""
    levels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BILINEAR)


def pictures(count: int, mixed: bool = False) -> list[Image.Image]:
    """Pictures of one shape, or of three."""
    shapes = [(24, 24), (24, 32), (40, 24)] if mixed else [(24, 24)]
    return [picture(seed, *shapes[seed % len(shapes)]) for seed in range(count)]


def png(image: Image.Image) -> bytes:
    """Its bytes in a file that loses nothing."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def load_lrm(folder: str | Path, base: str | None = None, **settings: Any) -> RewardModel:
    """Load LRM's layout, whichever files are missing by which it is recognised."""
    return PublishedLRM(folder, base, PublishedSettings(**settings)).load(RewardModel)


def load_dina_lrm(folder: str | Path, base: str | None = None, **settings: Any) -> RewardModel:
    """Load DiNa-LRM's layout, whichever files are missing by which it is recognised."""
    return PublishedDiNaLRM(folder, base, PublishedSettings(**settings)).load(RewardModel)
