"""Reward models (a backbone with a head) that load from files and score images, and loaders of the papers' models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
