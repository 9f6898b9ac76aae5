"""Rewards of noisy latents: heads, losses and metrics of pairs, training, stored rewards, and other scorers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
