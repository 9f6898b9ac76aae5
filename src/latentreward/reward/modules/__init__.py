"""LightningModules that train reward models."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
