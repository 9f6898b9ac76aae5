"""Heads: networks that compute a score from a backbone's features."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
