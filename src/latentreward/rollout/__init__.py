"""Rollouts of a policy: sample prompts step by step, score candidates or finished latents, select training rows."""

from latentreward.rollout.advantages import GDPO, Advantage, GroupAdvantage, group_advantages, tracked_advantages
from latentreward.rollout.base import StepSampler
from latentreward.rollout.candidates import Branching, CandidateStep, candidate_steps
from latentreward.rollout.ddim import DDIMSampler
from latentreward.rollout.finished import check_sigmas, score_finished, score_states
from latentreward.rollout.flow_sde import FlowSDESampler
from latentreward.rollout.pair_selection import (
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
from latentreward.rollout.prompted import PromptedPolicy
from latentreward.rollout.reward_guidance import (
    GuidedSampler,
    GuidedTransition,
    RewardGuidance,
    require_gradient,
    reward_gradient,
    sample_guided,
)
from latentreward.rollout.rollout_noise import RolloutDraws
from latentreward.rollout.settings import Sampling
from latentreward.rollout.step_choice import RandomSteps, StepChoice, StratifiedSteps
from latentreward.rollout.trajectories import Trajectories, sample_latents, sample_trajectories
from latentreward.rollout.transition import Transition

__all__ = [
    "GDPO",
    "Advantage",
    "Branching",
    "CandidateStep",
    "DDIMSampler",
    "FixedThreshold",
    "FlowSDESampler",
    "GroupAdvantage",
    "GuidedSampler",
    "GuidedTransition",
    "LinearThreshold",
    "PairSelection",
    "PromptedPolicy",
    "QuantileThreshold",
    "RandomSteps",
    "RewardGuidance",
    "RolloutDraws",
    "Sampling",
    "ScheduledThreshold",
    "SelectedPairs",
    "SigmaThreshold",
    "StepChoice",
    "StepSampler",
    "StratifiedSteps",
    "ThresholdSelection",
    "Trajectories",
    "Transition",
    "VarianceThreshold",
    "candidate_steps",
    "check_sigmas",
    "gap_quantiles",
    "group_advantages",
    "require_gradient",
    "reward_gradient",
    "sample_guided",
    "sample_latents",
    "sample_trajectories",
    "score_finished",
    "score_states",
    "step_pairs",
    "tracked_advantages",
]
