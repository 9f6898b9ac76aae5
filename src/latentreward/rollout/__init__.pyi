from .advantages import GDPO, Advantage, DiversityAdvantage, GroupAdvantage, group_advantages
from .candidates import Branching, CandidateStep, candidate_steps
from .credit import Credit, GainCredit, StateCredit, TurningPointCredit
from .finished import begin_finished, check_sigmas, rows_of, score_finished, score_states
from .pair_selection import (
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
from .prompted import PromptedPolicy, RolloutDraws
from .reward_guidance import (
    GuidedSampler,
    GuidedTransition,
    RewardGuidance,
    refuse_float16,
    require_gradient,
    reward_gradient,
    sample_guided,
)
from .samplers import DDIMSampler, FlowSDESampler, StepSampler, Transition, reporting_steps
from .settings import Sampling
from .step_choice import NoisiestSteps, RandomSteps, StepChoice, StratifiedSteps
from .trajectories import Trajectories, sample_latents, sample_trajectories
from .window import MovingWindow, RandomWindow, Window, WindowedSampler

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
    "NoisiestSteps",
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
    "refuse_float16",
    "reporting_steps",
    "require_gradient",
    "reward_gradient",
    "rows_of",
    "sample_guided",
    "sample_latents",
    "sample_trajectories",
    "score_finished",
    "score_states",
    "step_pairs",
]
