"""Rewards for alignment: latent reward models, pixel scorers, own functions, random controls, and mixtures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
