"""Lightning callbacks of this package; YAML names one as ``latentreward.callbacks.Name`` or by its bare class name."""

from latentreward.callbacks.bands import NoiseBandAccuracy, TimestepBands
from latentreward.callbacks.collapse_guard import CollapseGuard
from latentreward.callbacks.encode_once import EncodeOnce
from latentreward.callbacks.exact_resume import ExactResume
from latentreward.callbacks.graceful_stop import GracefulStop
from latentreward.callbacks.hacking_monitor import HackingMonitor
from latentreward.callbacks.last_checkpoint import LastCheckpoint
from latentreward.callbacks.nan_guard import NaNGuard
from latentreward.callbacks.pairs import AccuracyInterval, PairScoreWriter, ScoredPairGrid
from latentreward.callbacks.performance import ParameterSummary, Performance
from latentreward.callbacks.policy_lora import PolicyLoRA
from latentreward.callbacks.prompt_monitor import ReferenceDrift, SampleGrid, SourceChange
from latentreward.callbacks.resumed_settings import ResumedSettings
from latentreward.callbacks.run_progress import RunProgress
from latentreward.callbacks.trainable import TrainableCheckpoint, TrainableEMA

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
    "TimestepBands",
    "TrainableCheckpoint",
    "TrainableEMA",
]
