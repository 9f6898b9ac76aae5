from .calibration import Calibration
from .layouts.card import Card
from .layouts.find import ModelSource
from .layouts.published import PublishedSettings
from .released import load_dina_lrm, load_lrm
from .reward_model import RewardModel, normalise_score
from .scoring_noise import ScoringNoise

__all__ = [
    "Calibration",
    "Card",
    "ModelSource",
    "PublishedSettings",
    "RewardModel",
    "ScoringNoise",
    "load_dina_lrm",
    "load_lrm",
    "normalise_score",
]
