"""LightningModules that train reward models and align policies."""

from latentreward.modules.alignment import AlignmentModule, RewardedModule, RolloutModule
from latentreward.modules.diffusion_dpo import DiffusionDPOModule
from latentreward.modules.dina_lrm import DiNaLRMModule
from latentreward.modules.forward_process import AWMModule, DiffusionNFTModule, ForwardProcessModule
from latentreward.modules.grpo import GRPOModule, StepwiseGRPOModule, TrajectoryGRPOModule, group_statistics
from latentreward.modules.lpo import LPOModule, StepRatios
from latentreward.modules.lrm import LRMModule
from latentreward.modules.pairs import ScoredPairs
from latentreward.modules.refl import ReFLModule
from latentreward.modules.reward import RewardModule
from latentreward.modules.schedules import WarmupSchedule
from latentreward.modules.spo import SPOModule
from latentreward.modules.step_aware_pixel import StepAwarePixelModule

__all__ = [
    "AWMModule",
    "AlignmentModule",
    "DiNaLRMModule",
    "DiffusionDPOModule",
    "DiffusionNFTModule",
    "ForwardProcessModule",
    "GRPOModule",
    "LPOModule",
    "LRMModule",
    "ReFLModule",
    "RewardModule",
    "RewardedModule",
    "RolloutModule",
    "SPOModule",
    "ScoredPairs",
    "StepAwarePixelModule",
    "StepRatios",
    "StepwiseGRPOModule",
    "TrajectoryGRPOModule",
    "WarmupSchedule",
    "group_statistics",
]
