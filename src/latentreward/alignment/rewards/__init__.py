"""Rewards for alignment: latent reward models, pixel scorers, own functions, random controls, and mixtures."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
