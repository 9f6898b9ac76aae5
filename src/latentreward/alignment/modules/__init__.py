"""LightningModules that align policies, one file a method."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
