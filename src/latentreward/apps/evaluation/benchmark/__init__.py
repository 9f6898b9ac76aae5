"""Preference benchmarks of reward models, evaluated by their published protocols."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
