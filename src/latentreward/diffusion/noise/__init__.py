"""Noise processes (latents to noisy latents) and samplers of noise levels."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
