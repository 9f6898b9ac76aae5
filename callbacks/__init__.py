"""Lightning callbacks of this package; YAML names one as ``latentreward.callbacks.Name`` or by its bare class name."""

from latentreward.callbacks.accuracy_interval import AccuracyInterval
from latentreward.callbacks.collapse_guard import CollapseGuard
from latentreward.callbacks.encode_once import EncodeOnce
from latentreward.callbacks.exact_resume import ExactResume
from latentreward.callbacks.graceful_stop import GracefulStop
from latentreward.callbacks.hacking_monitor import HackingMonitor
from latentreward.callbacks.last_checkpoint import LastCheckpoint
from latentreward.callbacks.nan_guard import NaNGuard
from latentreward.callbacks.noise_band_accuracy import NoiseBandAccuracy
from latentreward.callbacks.pair_grid import ScoredPairGrid
from latentreward.callbacks.pair_score_writer import PairScoreWriter
from latentreward.callbacks.parameter_summary import ParameterSummary
from latentreward.callbacks.performance import Performance
from latentreward.callbacks.policy_lora import PolicyLoRA
from latentreward.callbacks.reference_drift import ReferenceDrift
from latentreward.callbacks.resumed_settings import ResumedSettings
from latentreward.callbacks.run_progress import RunProgress
from latentreward.callbacks.sample_grid import SampleGrid
from latentreward.callbacks.source_change import SourceChange
from latentreward.callbacks.tensorboard_charts import TensorBoardCharts
from latentreward.callbacks.throughput import Throughput
from latentreward.callbacks.timestep_bands import TimestepBands
from latentreward.callbacks.trainable_checkpoint import TrainableCheckpoint
from latentreward.callbacks.trainable_ema import TrainableEMA

__all__ = [
    "AccuracyInterval",
    "CollapseGuard",
    "EncodeOnce",
    "ExactResume",
    "GracefulStop",
    "HackingMonitor",
    "LastCheckpoint",
    "NaNGuard",
    "NoiseBandAccuracy",
    "PairScoreWriter",
    "ParameterSummary",
    "Performance",
    "PolicyLoRA",
    "ReferenceDrift",
    "ResumedSettings",
    "RunProgress",
    "SampleGrid",
    "ScoredPairGrid",
    "SourceChange",
    "TensorBoardCharts",
    "Throughput",
    "TimestepBands",
    "TrainableCheckpoint",
    "TrainableEMA",
]
