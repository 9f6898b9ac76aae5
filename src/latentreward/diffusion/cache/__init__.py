"""Latents and text embeddings on disk: written once by ``latentreward cache``, read in training."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
