"""Losses on scores of pairs, log-probabilities of sampler steps, rewards or predictions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
