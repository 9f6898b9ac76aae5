"""Backbones: parts of diffusion networks that compute features from noisy latents.

YAML may name a factory without its import path: ``sd15``, ``sd21``, ``sdxl``, ``sd_tiny``, ``sd3_medium``,
``sd35_medium``, ``sd35_large``, ``sd35_tiny``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
