"""Reward models (a backbone with a head) that load from files and score images, and loaders of the papers' models."""

from latentreward.scoring.calibration import Calibration
from latentreward.scoring.layouts.card import Card
from latentreward.scoring.layouts.published import PublishedSettings
from latentreward.scoring.reward_model import RewardModel, load_dina_lrm, load_lrm, normalise_score
from latentreward.scoring.scoring_noise import ScoringNoise

__all__ = [
    "Calibration",
    "Card",
    "PublishedSettings",
    "RewardModel",
    "ScoringNoise",
    "load_dina_lrm",
    "load_lrm",
    "normalise_score",
]
