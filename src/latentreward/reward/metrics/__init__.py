"""Metrics of preference models, as torchmetrics classes."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
