"""Readers of preference pairs: one module per data format; every reader is a :class:`PairReader`."""
