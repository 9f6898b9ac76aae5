"""Lightning callbacks of this package; YAML names one as ``latentreward.callbacks.Name`` or by its bare class name."""

from latentreward.callbacks.checkpoints import LastCheckpoint as LastCheckpoint
from latentreward.callbacks.checkpoints import NaNGuard as NaNGuard
from latentreward.callbacks.checkpoints import PolicyLoRA as PolicyLoRA
from latentreward.callbacks.checkpoints import TrainableCheckpoint as TrainableCheckpoint
from latentreward.callbacks.checkpoints import TrainableEMA as TrainableEMA
from latentreward.callbacks.encode_once import EncodeOnce as EncodeOnce
from latentreward.callbacks.exact_resume import ExactResume as ExactResume
from latentreward.callbacks.graceful_stop import GracefulStop as GracefulStop
from latentreward.callbacks.look_ahead import RefreshLookAhead as RefreshLookAhead
from latentreward.callbacks.pairs import PairScoreWriter as PairScoreWriter
from latentreward.callbacks.pairs import ScoredPairGrid as ScoredPairGrid
from latentreward.callbacks.pairs import TimestepBands as TimestepBands
from latentreward.callbacks.performance import Performance as Performance
from latentreward.callbacks.prompt_monitor import CollapseGuard as CollapseGuard
from latentreward.callbacks.prompt_monitor import HackingMonitor as HackingMonitor
from latentreward.callbacks.prompt_monitor import SampleGrid as SampleGrid
from latentreward.callbacks.resumed_settings import ResumedSettings as ResumedSettings
from latentreward.callbacks.run_progress import RunProgress as RunProgress
