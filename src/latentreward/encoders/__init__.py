"""Pixels and words → latents and embeddings.

Import from the modules (``latentreward.encoders.vae`` …): they load diffusers and transformers, which takes seconds.
"""
