"""Backbones: parts of diffusion networks that compute features from noisy latents.

YAML may name a factory without its import path, such as ``sd15`` or ``sd35_medium``. Factories lie in the files of
their families (:mod:`latentreward.diffusion.families`), and ``from latentreward.diffusion.backbones import sd15`` finds
them too.
"""
