"""Backbones: parts of diffusion networks that compute features from noisy latents."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
