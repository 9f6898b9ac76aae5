"""A tiny world of coloured shapes: scenes, an oracle that judges pixels, preference data, two pretrained pipelines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
