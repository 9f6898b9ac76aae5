"""Losses on scores of pairs."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
