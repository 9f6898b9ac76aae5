"""Scorers of images, for filtering of preference pairs, for evaluation and as rewards on pixels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
