from .calibration import Calibration
from .images import edit_prompt
from .layouts.card import Card
from .layouts.find import ModelSource
from .layouts.papers import PublishedSettings
from .reward_model import RewardModel, normalise_score
from .scoring_noise import ScoringNoise

__all__ = [
    "Calibration",
    "Card",
    "ModelSource",
    "PublishedSettings",
    "RewardModel",
    "ScoringNoise",
    "edit_prompt",
    "normalise_score",
]
