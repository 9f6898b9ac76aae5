"""Scorers of images in pixels, for filtering pairs and for comparison with rewards on latents."""

from latentreward.scorers.aesthetic import AestheticScorer
from latentreward.scorers.base import ImageScorer, Scorer, TableScorer
from latentreward.scorers.clip import CLIPScorer, PickScorer
from latentreward.scorers.plugins import CallableScorer, TableColumn

__all__ = [
    "AestheticScorer",
    "CLIPScorer",
    "CallableScorer",
    "ImageScorer",
    "PickScorer",
    "Scorer",
    "TableColumn",
    "TableScorer",
]
