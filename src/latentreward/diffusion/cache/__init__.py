"""Latents and text embeddings on disk: written once by ``latentreward cache``, read in training."""
