"""Families of generators: the conventions of each family's networks behind one interface."""

from latentreward.families.base import Family, PipelineConfigs
from latentreward.families.find import families, find_family, import_family, is_foreign

__all__ = ["Family", "PipelineConfigs", "families", "find_family", "import_family", "is_foreign"]
