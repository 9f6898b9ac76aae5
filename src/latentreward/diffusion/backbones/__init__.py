"""Backbones: parts of diffusion networks that compute features from noisy latents."""
