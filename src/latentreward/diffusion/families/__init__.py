"""Families of generators: the conventions of each family's networks behind one interface."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
