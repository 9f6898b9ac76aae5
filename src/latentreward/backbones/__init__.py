"""Backbones: parts of diffusion networks that compute features from noisy latents.

YAML may name a factory without its import path: ``sd15``, ``sd21``, ``sdxl``, ``sd_tiny``, ``sd3_medium``,
``sd35_medium``, ``sd35_large``, ``sd35_tiny``.
"""

from latentreward.backbones.base import DiffusionBackbone, check_taps
from latentreward.backbones.registry import backbone_names, create_backbone, register_backbone
from latentreward.backbones.sd3_dit import SD3DiTBackbone, sd3_medium, sd35_large, sd35_medium, sd35_tiny
from latentreward.backbones.sd_unet import SDUNetBackbone, sd15, sd21, sd_tiny, sdxl
from latentreward.backbones.tuning import LoRA

__all__ = [
    "DiffusionBackbone",
    "LoRA",
    "SD3DiTBackbone",
    "SDUNetBackbone",
    "backbone_names",
    "check_taps",
    "create_backbone",
    "register_backbone",
    "sd3_medium",
    "sd15",
    "sd21",
    "sd35_large",
    "sd35_medium",
    "sd35_tiny",
    "sd_tiny",
    "sdxl",
]
