"""Data: preference pairs from files to batches of chosen and rejected pixels, and prompts for alignment."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
