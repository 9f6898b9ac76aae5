"""Families of generators: the conventions of each family's networks behind one interface."""
