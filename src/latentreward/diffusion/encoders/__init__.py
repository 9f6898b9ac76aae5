"""Encoders of pixels into latents and of prompts into embeddings.

This package exports nothing: import from its modules, e.g. ``latentreward.diffusion.encoders.vae``. They import
diffusers and transformers, which takes seconds.
"""
