from .aesthetic import AestheticScorer
from .base import ImageScorer, Scorer, TableScorer
from .clip import CLIPScorer, PickScorer
from .hpsv2 import HPSv2Scorer
from .http import HTTPScorer
from .plugins import CallableScorer, TableColumn
from .reward_model import RewardModelScorer
from .step_aware import StepAwareScorer

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
