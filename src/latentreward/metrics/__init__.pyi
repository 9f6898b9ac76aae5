from .calibration import PairCalibration
from .noise_levels import ByNoiseLevel
from .pairwise import GroupPairAccuracy, MeanLoss, MeanMargin, PairwiseAccuracy
from .rank_correlation import ScoreCorrelation

__all__ = [
    "ByNoiseLevel",
    "GroupPairAccuracy",
    "MeanLoss",
    "MeanMargin",
    "PairCalibration",
    "PairwiseAccuracy",
    "ScoreCorrelation",
]
