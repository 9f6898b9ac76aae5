"""Twins of Qwen-Image, with tokenizers that pad on the right and on the left, and without guidance."""

from typing import Any

from diffusers import QwenImagePipeline
from torch import Tensor

from tests.diffusion.families.made_qwen_image import qwen_image
from tests.diffusion.families.twins import Twin


def packed(latents: Tensor, size: tuple[int, int]) -> Tensor:
    rows, channels, _, height, width = latents.shape
    return QwenImagePipeline._pack_latents(latents, rows, channels, height, width)


def unpacked(latents: Tensor, size: tuple[int, int]) -> Tensor:
    return QwenImagePipeline._unpack_latents(latents, *size, vae_scale_factor=8)


GUIDED = {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}
COMMON: dict[str, Any] = {"family": "qwen_image", "given": packed, "found": unpacked, "backbone": "qwen_image"}
OTHERS = {"same_network": True, **COMMON}
TWINS = [
    Twin("qwen_image", build=qwen_image, call=GUIDED, **COMMON),
    Twin("qwen_image_left", build=lambda: qwen_image(padding_side="left"), call=GUIDED, **OTHERS),
    Twin("qwen_image_unguided", build=qwen_image, call={"true_cfg_scale": 1.0}, guidance=1.0, **OTHERS),
]
