"""Scorers of images, for filtering of preference pairs, for evaluation and as rewards on pixels."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
