"""Families of generators: the conventions of each family's networks behind one interface."""

from latentreward.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.families.base import Family, PipelineConfigs
from latentreward.families.find import families, find_family, import_family, is_foreign
from latentreward.families.flow import FlowFamily

__all__ = [
    "Family",
    "FamilyBackbone",
    "FlowFamily",
    "PipelineConfigs",
    "families",
    "find_family",
    "import_family",
    "is_foreign",
    "load_family_backbone",
]
