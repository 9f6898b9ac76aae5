from .export.lora import TrainedLoRA, loading_call, write_kohya, write_merged
from .losses.clipped_policy import (
    ClippedPolicyLoss,
    OutcomeProcessLoss,
    gaussian_step_kl,
    held_weights,
)
from .losses.dpo import (
    LinearDPO,
    StepDPO,
    StepDPOResult,
    StepPairLoss,
    StepRatios,
    clamped_log_ratio,
    denoising_error,
    implicit_rewards,
)
from .losses.group_preference import CRDLoss, CRDResult, DGPOLoss
from .losses.matching import MatchingLoss, velocity_divergence
from .losses.nft import NFTLoss
from .losses.trust_region import (
    FlowDPPO,
    GRPOGuard,
    KLGate,
    NormGuard,
    Penalty,
    RankGate,
    RatioRule,
    StepDrift,
    TrustRegion,
)
from .modules.alignment import AlignmentModule
from .modules.diffusion_dpo import DiffusionDPOModule
from .modules.forward_process import AWMModule, DiffusionNFTModule, ForwardProcessModule
from .modules.group_preference import CRDModule, DGPOModule
from .modules.grpo import GRPOModule, StepwiseGRPOModule, TrajectoryGRPOModule, group_statistics
from .modules.look_ahead import LookAheadModule
from .modules.lpo import LPOModule, SPOModule
from .modules.on_policy import OnPolicyDistillationModule, OnPolicyLoss, Teacher
from .modules.opsd import DiffusionOPSDModule, reward_ascent
from .modules.ram import RAMLoss, RAMModule, directed_target
from .modules.refl import ReFLModule, RewardLoss
from .modules.step_aware_pixel import StepAwarePixelModule
from .policies.checkpoint import load_policy
from .policies.loading import PolicySource
from .policies.policy import POLICY, AdapterSwitch, Policy
from .rewards.base import Reward, RewardSource, begin_finished, check_sigmas, rows_of, score_finished, score_states
from .rewards.callable import CallableReward, RandomReward, UnchangedRegion
from .rewards.http import HTTPReward
from .rewards.latent import LatentReward, surrogate
from .rewards.look_ahead import warn_of_another_policy, within_prompts
from .rewards.mixture import RewardMixture
from .rewards.pixel import PixelReward
from .rollout.advantages import (
    GDPO,
    Advantage,
    Credit,
    DiversityAdvantage,
    GainCredit,
    GroupAdvantage,
    StateCredit,
    TurningPointCredit,
    group_advantages,
)
from .rollout.candidates import (
    Branching,
    CandidateStep,
    FixedThreshold,
    LinearThreshold,
    PairSelection,
    QuantileThreshold,
    ScheduledThreshold,
    SelectedPairs,
    SigmaThreshold,
    ThresholdSelection,
    VarianceThreshold,
    candidate_steps,
    gap_quantiles,
    step_pairs,
)
from .rollout.halving import Halving
from .rollout.keep_best import KeepBest
from .rollout.pruning import Agreement, BestAndWorst, Pruning, PruningRule, scaled_advantages
from .rollout.reward_guidance import (
    GuidedSampler,
    RewardGuidance,
    require_finite,
    require_gradient,
    reward_gradient,
    sample_guided,
)
from .rollout.samplers import DDIMSampler, FlowSDESampler, Sampling, StepSampler, Transition
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
    "Credit",
    "DDIMSampler",
    "DGPOLoss",
    "DGPOModule",
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
    "HTTPReward",
    "Halving",
    "KLGate",
    "KeepBest",
    "LPOModule",
    "LatentReward",
    "LinearDPO",
    "LinearThreshold",
    "LookAheadModule",
    "MatchingLoss",
    "MovingWindow",
    "NFTLoss",
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
    "UnchangedRegion",
    "VarianceThreshold",
    "Window",
    "WindowedSampler",
    "begin_finished",
    "candidate_steps",
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
    "warn_of_another_policy",
    "within_prompts",
    "write_kohya",
    "write_merged",
]
