from .export.lora import TrainedLoRA, write_kohya
from .export.merged import loading_call, write_merged
from .losses.clipped_policy import (
    ClippedPolicyLoss,
    ClippedPolicyResult,
    OutcomeProcessLoss,
    gaussian_step_kl,
    held_weights,
)
from .losses.diffusion_dpo import LinearDPO, LinearDPOResult, denoising_error, implicit_rewards
from .losses.group_preference import CRDLoss, CRDResult, DGPOLoss, DGPOResult
from .losses.matching import MatchingLoss, MatchingResult, velocity_divergence
from .losses.nft import NFTLoss, NFTResult
from .losses.trust_region import (
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
from .modules.alignment import AlignmentModule
from .modules.diffusion_dpo import DiffusionDPOModule
from .modules.forward_process import AWMModule, DiffusionNFTModule, ForwardProcessModule
from .modules.group_preference import CRDModule, DGPOModule
from .modules.grpo import GRPOModule, StepwiseGRPOModule, TrajectoryGRPOModule, group_statistics
from .modules.lpo import LPOModule, SPOModule, StepDPO, StepDPOResult, StepPairLoss, StepRatios, clamped_log_ratio
from .modules.on_policy import OnPolicyDistillationModule, OnPolicyLoss, Teacher
from .modules.opsd import DiffusionOPSDModule, reward_ascent
from .modules.ram import RAMLoss, RAMModule, directed_target
from .modules.refl import ReFLModule, RewardLoss
from .modules.step_aware_pixel import StepAwarePixelModule
from .policies.checkpoint import load_policy
from .policies.loading import PolicySource
from .policies.policy import POLICY, AdapterSwitch, Policy
from .rewards.base import Reward, RewardSource, begin_finished, check_sigmas, rows_of, score_finished, score_states
from .rewards.callable import CallableReward, RandomReward
from .rewards.http import HTTPReward
from .rewards.latent import LatentReward, surrogate
from .rewards.mixture import RewardMixture
from .rewards.pixel import PixelReward
from .rewards.unchanged import UnchangedRegion
from .rollout.advantages import GDPO, Advantage, DiversityAdvantage, GroupAdvantage, group_advantages
from .rollout.candidates import Branching, CandidateStep, candidate_steps
from .rollout.credit import Credit, GainCredit, StateCredit, TurningPointCredit
from .rollout.pair_selection import (
    FixedThreshold,
    LinearThreshold,
    PairSelection,
    QuantileThreshold,
    ScheduledThreshold,
    SelectedPairs,
    SigmaThreshold,
    ThresholdSelection,
    VarianceThreshold,
    gap_quantiles,
    step_pairs,
)
from .rollout.pruning import Agreement, BestAndWorst, Pruning, PruningRule, scaled_advantages
from .rollout.reward_guidance import (
    GuidedSampler,
    GuidedTransition,
    RewardGuidance,
    refuse_float16,
    require_finite,
    require_gradient,
    reward_gradient,
    sample_guided,
)
from .rollout.samplers import DDIMSampler, FlowSDESampler, Sampling, StepSampler, Transition, reporting_steps
from .rollout.step_choice import (
    MovingWindow,
    NoisiestSteps,
    RandomSteps,
    RandomWindow,
    StepChoice,
    StratifiedSteps,
    Window,
    WindowedSampler,
)
from .rollout.trajectories import (
    PriorNoise,
    PromptedPolicy,
    RolloutDraws,
    Trajectories,
    sample_latents,
    sample_pruned,
    sample_trajectories,
)

__all__ = [
    "GDPO",
    "POLICY",
    "AWMModule",
    "AdapterSwitch",
    "Advantage",
    "Agreement",
    "AlignmentModule",
    "BestAndWorst",
    "Branching",
    "CRDLoss",
    "CRDModule",
    "CRDResult",
    "CallableReward",
    "CandidateStep",
    "ClippedPolicyLoss",
    "ClippedPolicyResult",
    "Credit",
    "DDIMSampler",
    "DGPOLoss",
    "DGPOModule",
    "DGPOResult",
    "DiffusionDPOModule",
    "DiffusionNFTModule",
    "DiffusionOPSDModule",
    "DiversityAdvantage",
    "FixedThreshold",
    "FlowDPPO",
    "FlowSDESampler",
    "ForwardProcessModule",
    "GRPOGuard",
    "GRPOModule",
    "GainCredit",
    "GroupAdvantage",
    "GuidedSampler",
    "GuidedTransition",
    "HTTPReward",
    "KLGate",
    "LPOModule",
    "LatentReward",
    "LinearDPO",
    "LinearDPOResult",
    "LinearThreshold",
    "MatchingLoss",
    "MatchingResult",
    "MovingWindow",
    "NFTLoss",
    "NFTResult",
    "NoisiestSteps",
    "NormGuard",
    "OnPolicyDistillationModule",
    "OnPolicyLoss",
    "OutcomeProcessLoss",
    "PairSelection",
    "Penalty",
    "PixelReward",
    "Policy",
    "PolicySource",
    "PriorNoise",
    "PromptedPolicy",
    "Pruning",
    "PruningRule",
    "QuantileThreshold",
    "RAMLoss",
    "RAMModule",
    "RandomReward",
    "RandomSteps",
    "RandomWindow",
    "RankGate",
    "RatioRule",
    "ReFLModule",
    "Reward",
    "RewardGuidance",
    "RewardLoss",
    "RewardMixture",
    "RewardSource",
    "RolloutDraws",
    "RuleContext",
    "SPOModule",
    "Sampling",
    "ScheduledThreshold",
    "SelectedPairs",
    "SigmaThreshold",
    "StateCredit",
    "StepAwarePixelModule",
    "StepChoice",
    "StepDPO",
    "StepDPOResult",
    "StepDrift",
    "StepPairLoss",
    "StepRatios",
    "StepSampler",
    "StepwiseGRPOModule",
    "StratifiedSteps",
    "Teacher",
    "ThresholdSelection",
    "TrainedLoRA",
    "Trajectories",
    "TrajectoryGRPOModule",
    "Transition",
    "TrustRegion",
    "TurningPointCredit",
    "UncertaintyGate",
    "UnchangedRegion",
    "VarianceThreshold",
    "Window",
    "WindowedSampler",
    "begin_finished",
    "candidate_steps",
    "check_rules",
    "check_sigmas",
    "clamped_log_ratio",
    "denoising_error",
    "directed_target",
    "gap_quantiles",
    "gaussian_step_kl",
    "group_advantages",
    "group_statistics",
    "held_weights",
    "implicit_rewards",
    "load_policy",
    "loading_call",
    "refuse_float16",
    "reporting_steps",
    "require_finite",
    "require_gradient",
    "reward_ascent",
    "reward_gradient",
    "rows_of",
    "sample_guided",
    "sample_latents",
    "sample_pruned",
    "sample_trajectories",
    "scaled_advantages",
    "score_finished",
    "score_states",
    "step_pairs",
    "surrogate",
    "velocity_divergence",
    "write_kohya",
    "write_merged",
]
