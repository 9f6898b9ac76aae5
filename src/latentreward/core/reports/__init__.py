"""Reports: self-contained HTML pages, which load nothing from other files or the network, and Markdown and JSON."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
