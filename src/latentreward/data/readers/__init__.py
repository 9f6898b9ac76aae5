"""Readers of preference pairs: one module per data format; every reader is a :class:`PairReader`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
