from .calibration import Calibration
from .layouts.card import Card
from .layouts.published import PublishedSettings
from .reward_model import RewardModel, load_dina_lrm, load_lrm, normalise_score
from .scoring_noise import ScoringNoise

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
