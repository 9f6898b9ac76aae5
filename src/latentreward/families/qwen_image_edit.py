"""Qwen-Image-Edit and its releases 2509 and 2511, which take several pictures and show them to the text encoder too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentreward.backbones.registry import register_backbone
from latentreward.contracts import Conditioning, PathText
from latentreward.encoders.sources import SourceSize
from latentreward.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.families.flow import Tokens
from latentreward.families.qwen_image import QwenImage


class QwenImageEdit(QwenImage):
    """Family of Qwen-Image-Edit: as Qwen-Image, with sources.

    In the release 2511 (``zero_cond_t``) the sources' tokens are modulated as at time 0.
    """

    name = "qwen_image_edit"
    title = "Qwen-Image-Edit"
    refused: ClassVar[Mapping[str, str]] = {}
    sources = (1, None)

    @property
    def zero_time(self) -> bool:
        """Whether the sources' tokens are modulated as at time 0."""
        return self.entry(self.part, "zero_cond_t", bool, default=False)

    def source_size(self, height: int, width: int) -> SourceSize:
        """See :meth:`Family.source_size`; an area of about 1024² pixels, the aspect kept to multiples of 32 pixels."""
        aspect = width / height
        columns = math.sqrt(1024 * 1024 * aspect)
        return SourceSize((round(columns / aspect / 32) * 32, round(columns / 32) * 32))

    def begin(self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tokens:
        """See :meth:`FlowFamily.begin`."""
        tokens = super().begin(network, latents, sigma, conditioning)
        if self.zero_time:
            tokens.others["temb"] = torch.cat([tokens.temb, network.time_text_embed(0 * sigma, tokens.visual)])
            of_sources = torch.arange(tokens.visual.shape[1], device=sigma.device) >= math.prod(tokens.grid)
            tokens.others["modulate_index"] = of_sources.int().expand(len(sigma), -1)
        return tokens


@register_backbone
def qwen_image_edit(source: PathText, **options: Any) -> FamilyBackbone:
    """Load Qwen-Image-Edit, 2509 or 2511 (Apache-2.0): 60 blocks.

    Args:
        source: Diffusers pipeline folder, or hub id.
        options: See :func:`~latentreward.families.backbone.load_family_backbone`.
    """
    return load_family_backbone(source, "qwen_image_edit", **options)
