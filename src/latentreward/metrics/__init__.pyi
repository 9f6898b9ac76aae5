from .calibration import PairCalibration
from .group_accuracy import GroupPairAccuracy
from .noise_levels import ByNoiseLevel
from .pairwise import MeanMargin, PairwiseAccuracy
from .rank_correlation import ScoreCorrelation

__all__ = ["ByNoiseLevel", "GroupPairAccuracy", "MeanMargin", "PairCalibration", "PairwiseAccuracy", "ScoreCorrelation"]
