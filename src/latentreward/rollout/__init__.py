"""Rollouts of a policy: sample prompts step by step, score candidates or finished latents, select training rows."""

from latentreward.rollout.advantages import (
    GDPO,
    Advantage,
    DiversityAdvantage,
    GroupAdvantage,
    group_advantages,
    tracked_advantages,
)
from latentreward.rollout.base import StepSampler, telling_steps
from latentreward.rollout.candidates import Branching, CandidateStep, candidate_steps
from latentreward.rollout.credit import Credit, GainCredit, StateCredit, TurningPointCredit
from latentreward.rollout.ddim import DDIMSampler
from latentreward.rollout.finished import (
    begin_finished,
    check_sigmas,
    rows_of,
    score_finished,
    score_states,
)
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
from latentreward.rollout.window import MovingWindow, RandomWindow, Window, WindowedSampler

__all__ = [
    "GDPO",
    "Advantage",
    "Branching",
    "CandidateStep",
    "Credit",
    "DDIMSampler",
    "DiversityAdvantage",
    "FixedThreshold",
    "FlowSDESampler",
    "GainCredit",
    "GroupAdvantage",
    "GuidedSampler",
    "GuidedTransition",
    "LinearThreshold",
    "MovingWindow",
    "PairSelection",
    "PromptedPolicy",
    "QuantileThreshold",
    "RandomSteps",
    "RandomWindow",
    "RewardGuidance",
    "RolloutDraws",
    "Sampling",
    "ScheduledThreshold",
    "SelectedPairs",
    "SigmaThreshold",
    "StateCredit",
    "StepChoice",
    "StepSampler",
    "StratifiedSteps",
    "ThresholdSelection",
    "Trajectories",
    "Transition",
    "TurningPointCredit",
    "VarianceThreshold",
    "Window",
    "WindowedSampler",
    "begin_finished",
    "candidate_steps",
    "check_sigmas",
    "gap_quantiles",
    "group_advantages",
    "require_gradient",
    "reward_gradient",
    "rows_of",
    "sample_guided",
    "sample_latents",
    "sample_trajectories",
    "score_finished",
    "score_states",
    "step_pairs",
    "telling_steps",
    "tracked_advantages",
]
