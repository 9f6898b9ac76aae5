from .base import DiffusionBackbone, check_taps
from .registry import backbone_names, create_backbone, register_backbone
from .sd3_dit import SD3DiTBackbone, sd3_medium, sd35_large, sd35_medium, sd35_tiny
from .sd_unet import SDUNetBackbone, sd15, sd21, sd_tiny, sdxl
from .tuning import LoRA

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
