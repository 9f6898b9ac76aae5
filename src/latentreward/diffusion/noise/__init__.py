"""Noise processes (latents to noisy latents) and samplers of noise levels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
