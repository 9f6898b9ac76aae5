from .base import PreferenceLoss, gather_pair_scores, gather_with_grad, weighted_mean
from .bradley_terry import BradleyTerryLoss, bradley_terry_nll
from .clipped_policy import ClippedPolicyLoss, ClippedPolicyResult, gaussian_step_kl, held_weights
from .diffusion_dpo import denoising_error, implicit_rewards
from .group_preference import CRDLoss, CRDResult, DGPOLoss, DGPOResult
from .linear_dpo import LinearDPO, LinearDPOResult
from .lrm import LRMLoss, lrm_batch_loss, lrm_pair_loss
from .matching import MatchingLoss, MatchingResult, velocity_divergence
from .nft import NFTLoss, NFTResult
from .on_policy import OnPolicyLoss
from .opsd import reward_ascent
from .outcome_process import OutcomeProcessLoss
from .ram import RAMLoss, directed_target
from .refl import RewardLoss
from .step_dpo import StepDPO, StepDPOResult, StepPairLoss, clamped_log_ratio
from .targets import (
    LabelLoss,
    RankingDistillation,
    RegressionDistillation,
    TargetLoss,
    gaussian_nll,
    teacher_preference,
)
from .thurstone import (
    ConstantVarianceThurstoneLoss,
    ThurstoneLoss,
    bhattacharyya_fidelity,
    comparison_std,
    log_ndtr,
    mixture_fidelity,
    thurstone_nll,
)
from .ties import TieLoss
from .trust_region import (
    FlowDPPO,
    GRPOGuard,
    KLGate,
    NormGuard,
    Penalty,
    RankGate,
    RatioRule,
    RuleContext,
    StepDrift,
    TrustRegion,
    UncertaintyGate,
    check_rules,
)

__all__ = [
    "BradleyTerryLoss",
    "CRDLoss",
    "CRDResult",
    "ClippedPolicyLoss",
    "ClippedPolicyResult",
    "ConstantVarianceThurstoneLoss",
    "DGPOLoss",
    "DGPOResult",
    "FlowDPPO",
    "GRPOGuard",
    "KLGate",
    "LRMLoss",
    "LabelLoss",
    "LinearDPO",
    "LinearDPOResult",
    "MatchingLoss",
    "MatchingResult",
    "NFTLoss",
    "NFTResult",
    "NormGuard",
    "OnPolicyLoss",
    "OutcomeProcessLoss",
    "Penalty",
    "PreferenceLoss",
    "RAMLoss",
    "RankGate",
    "RankingDistillation",
    "RatioRule",
    "RegressionDistillation",
    "RewardLoss",
    "RuleContext",
    "StepDPO",
    "StepDPOResult",
    "StepDrift",
    "StepPairLoss",
    "TargetLoss",
    "ThurstoneLoss",
    "TieLoss",
    "TrustRegion",
    "UncertaintyGate",
    "bhattacharyya_fidelity",
    "bradley_terry_nll",
    "check_rules",
    "clamped_log_ratio",
    "comparison_std",
    "denoising_error",
    "directed_target",
    "gather_pair_scores",
    "gather_with_grad",
    "gaussian_nll",
    "gaussian_step_kl",
    "held_weights",
    "implicit_rewards",
    "log_ndtr",
    "lrm_batch_loss",
    "lrm_pair_loss",
    "mixture_fidelity",
    "reward_ascent",
    "teacher_preference",
    "thurstone_nll",
    "velocity_divergence",
    "weighted_mean",
]
