import typing

from .base import DiffusionBackbone, check_taps
from .registry import backbone_names, create_backbone, register_backbone
from .sd3_dit import SD3DiTBackbone
from .sd_unet import SDUNetBackbone
from .transformer import TransformerBackbone
from .tuning import LoRA

__all__ = [
    "DiffusionBackbone",
    "LoRA",
    "SD3DiTBackbone",
    "SDUNetBackbone",
    "TransformerBackbone",
    "backbone_names",
    "check_taps",
    "create_backbone",
    "register_backbone",
]

def __getattr__(name: str) -> typing.Any: ...
