"""Readers of preference pairs: one module per data format; every reader is a :class:`PairReader`."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
