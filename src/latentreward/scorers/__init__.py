"""Scorers of images, for filtering of preference pairs, for evaluation and as rewards on pixels."""

from latentreward.scorers.aesthetic import AestheticScorer
from latentreward.scorers.base import ImageScorer, Scorer, TableScorer
from latentreward.scorers.clip import CLIPScorer, PickScorer
from latentreward.scorers.hpsv2 import HPSv2Scorer
from latentreward.scorers.http import HTTPScorer
from latentreward.scorers.plugins import CallableScorer, TableColumn
from latentreward.scorers.reward_model import RewardModelScorer
from latentreward.scorers.step_aware import StepAwareScorer

__all__ = [
    "AestheticScorer",
    "CLIPScorer",
    "CallableScorer",
    "HPSv2Scorer",
    "HTTPScorer",
    "ImageScorer",
    "PickScorer",
    "RewardModelScorer",
    "Scorer",
    "StepAwareScorer",
    "TableColumn",
    "TableScorer",
]
