from .alignment import AlignmentModule
from .diffusion_dpo import DiffusionDPOModule
from .dina_lrm import DiNaLRMModule
from .forward_process import AWMModule, DiffusionNFTModule, ForwardProcessModule
from .group_preference import CRDModule, DGPOModule
from .grpo import GRPOModule, StepwiseGRPOModule, TrajectoryGRPOModule, group_statistics
from .lpo import LPOModule, SPOModule, StepRatios
from .lrm import LRMModule
from .on_policy import OnPolicyDistillationModule, Teacher
from .opsd import DiffusionOPSDModule
from .optimizers import WarmupSchedule
from .pairs import ScoredPairs
from .ram import RAMModule
from .refl import ReFLModule
from .reward import RewardModule
from .step_aware_pixel import StepAwarePixelModule

__all__ = [
    "AWMModule",
    "AlignmentModule",
    "CRDModule",
    "DGPOModule",
    "DiNaLRMModule",
    "DiffusionDPOModule",
    "DiffusionNFTModule",
    "DiffusionOPSDModule",
    "ForwardProcessModule",
    "GRPOModule",
    "LPOModule",
    "LRMModule",
    "OnPolicyDistillationModule",
    "RAMModule",
    "ReFLModule",
    "RewardModule",
    "SPOModule",
    "ScoredPairs",
    "StepAwarePixelModule",
    "StepRatios",
    "StepwiseGRPOModule",
    "Teacher",
    "TrajectoryGRPOModule",
    "WarmupSchedule",
    "group_statistics",
]
