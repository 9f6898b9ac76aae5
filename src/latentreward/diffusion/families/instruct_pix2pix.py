"""InstructPix2Pix (arXiv:2211.09800): Stable Diffusion whose U-Net gets the picture to edit as further channels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.vae import SourceSize
from latentreward.diffusion.families.sd import SDUNetBackbone, StableDiffusion, load_sd

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class InstructPix2Pix(StableDiffusion):
    """Family of InstructPix2Pix on SD1.5 and SDXL: as Stable Diffusion, with one source of the size that is made.

    CosXL Edit, whose network takes scaled sources, is refused for its scheduler (EDM).
    """

    name = "instruct_pix2pix"
    title = "InstructPix2Pix"
    default_guidance = 7.5
    image_guidance_scale: float = 1.5
    passes = 3
    sources = (1, 1)

    @property
    def model(self) -> str:
        return f"InstructPix2Pix-{super().model}"

    def source_size(self, height: int, width: int) -> SourceSize:
        """See :meth:`Family.source_size`; each side down to a multiple of the VAE's."""
        step = self.side_multiple
        return SourceSize((height // step * step, width // step * step))

    def guided_prompts(self, conditioning: Conditioning, uncond: Conditioning) -> list[Conditioning]:
        """See :meth:`Family.guided_prompts`; the third pass has neither prompt nor source, but zeros."""
        without, given = super().guided_prompts(conditioning, uncond)
        bare = replace(without, source_latents=tuple(map(torch.zeros_like, without.source_latents)))
        return [without, given, bare]

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float, bare: Tensor | None = None) -> Tensor:
        """Combine predictions from prompt and source, the source, and none: equation 3 of arXiv:2211.09800."""
        assert bare is not None
        return bare + scale * (with_prompt - without) + self.image_guidance_scale * (without - bare)


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a U-Net that takes a picture to edit, from one of text to image; at first both predict the same.

    The weights of the new channels are zeros, as in the training of InstructPix2Pix (arXiv:2211.09800, section 3.2).
    """
    wide = type(unet).from_config(unet.config, in_channels=2 * unet.config.in_channels)
    weights = unet.state_dict()
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], dim=1)
    wide.load_state_dict(weights)
    return wide


@register_backbone
def ip2p_sd15(source: PathText, **options: Any) -> SDUNetBackbone:
    """Load InstructPix2Pix on Stable Diffusion 1.5 (CreativeML OpenRAIL-M; the authors' code MIT)."""
    return load_sd(source, "InstructPix2Pix-SD1.5", "instruct_pix2pix", **options)


@register_backbone
def ip2p_sdxl(source: PathText, **options: Any) -> SDUNetBackbone:
    """Load InstructPix2Pix on Stable Diffusion XL (CreativeML OpenRAIL++-M)."""
    return load_sd(source, "InstructPix2Pix-SDXL", "instruct_pix2pix", **options)
