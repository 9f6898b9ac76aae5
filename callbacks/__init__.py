"""Callbacks for what Lightning lacks; in YAML always ``latentreward.callbacks.Name``, or the bare name."""

from latentreward.callbacks.exact_resume import ExactResume
from latentreward.callbacks.graceful_stop import GracefulStop
from latentreward.callbacks.nan_guard import NaNGuard
from latentreward.callbacks.noise_band_accuracy import NoiseBandAccuracy
from latentreward.callbacks.pair_grid import ScoredPairGrid
from latentreward.callbacks.pair_score_writer import PairScoreWriter
from latentreward.callbacks.throughput import Throughput
from latentreward.callbacks.trainable_checkpoint import TrainableCheckpoint
from latentreward.callbacks.trainable_ema import TrainableEMA

__all__ = [
    "ExactResume",
    "GracefulStop",
    "NaNGuard",
    "NoiseBandAccuracy",
    "PairScoreWriter",
    "ScoredPairGrid",
    "Throughput",
    "TrainableCheckpoint",
    "TrainableEMA",
]
