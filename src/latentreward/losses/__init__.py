"""Losses on scores of pairs, log-probabilities of sampler steps, rewards or predictions."""

from latentreward.losses.base import PreferenceLoss, weighted_mean
from latentreward.losses.bradley_terry import BradleyTerryLoss, bradley_terry_nll
from latentreward.losses.clipped_policy import ClippedPolicyLoss, ClippedPolicyResult, gaussian_step_kl, held_weights
from latentreward.losses.diffusion_dpo import denoising_error, implicit_rewards
from latentreward.losses.gather import gather_pair_scores, gather_with_grad
from latentreward.losses.linear_dpo import LinearDPO, LinearDPOResult
from latentreward.losses.lrm import LRMLoss, lrm_batch_loss, lrm_pair_loss
from latentreward.losses.matching import MatchingLoss, MatchingResult, velocity_divergence
from latentreward.losses.nft import NFTLoss, NFTResult
from latentreward.losses.outcome_process import OutcomeProcessLoss
from latentreward.losses.refl import RewardLoss, prediction_drift
from latentreward.losses.step_dpo import StepDPO, StepDPOResult, StepPairLoss, clamped_log_ratio
from latentreward.losses.targets import (
    LabelLoss,
    RankingDistillation,
    RegressionDistillation,
    TargetLoss,
    gaussian_nll,
    label_nll,
    teacher_preference,
)
from latentreward.losses.thurstone import (
    ConstantVarianceThurstoneLoss,
    ThurstoneLoss,
    bhattacharyya_fidelity,
    comparison_std,
    log_ndtr,
    mixture_fidelity,
    thurstone_log_probability,
    thurstone_nll,
)
from latentreward.losses.ties import TieLoss
from latentreward.losses.trust_region import (
    FlowDPPO,
    GRPOGuard,
    KLGate,
    NormGuard,
    Penalty,
    RankGate,
    RatioRule,
    StepDrift,
    TrustRegion,
    UncertaintyGate,
)

__all__ = [
    "BradleyTerryLoss",
    "ClippedPolicyLoss",
    "ClippedPolicyResult",
    "ConstantVarianceThurstoneLoss",
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
    "OutcomeProcessLoss",
    "Penalty",
    "PreferenceLoss",
    "RankGate",
    "RankingDistillation",
    "RatioRule",
    "RegressionDistillation",
    "RewardLoss",
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
    "clamped_log_ratio",
    "comparison_std",
    "denoising_error",
    "gather_pair_scores",
    "gather_with_grad",
    "gaussian_nll",
    "gaussian_step_kl",
    "held_weights",
    "implicit_rewards",
    "label_nll",
    "log_ndtr",
    "lrm_batch_loss",
    "lrm_pair_loss",
    "mixture_fidelity",
    "prediction_drift",
    "teacher_preference",
    "thurstone_log_probability",
    "thurstone_nll",
    "velocity_divergence",
    "weighted_mean",
]
