"""Step-wise search in our own sampling loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from latentreward.contracts import PromptBatch
from latentreward.policies import Policy
from latentreward.rewards import Reward
from latentreward.rollout import Branching, RolloutDraws, Sampling, candidate_steps


@dataclass
class Candidates:
    """Several next states at each step within a window of timesteps, of which the best goes on.

    Attributes:
        num_candidates: Candidates K per step, at least 2.
        low: Least timestep at which is searched; below it one state is drawn.
        high: Greatest one.
        score_at: Timestep that the reward is told: that of the ``step`` (LPO), or that of the ``candidate`` (SPO).
    """

    num_candidates: int = 4
    low: float = 0.0
    high: float = 1000.0
    score_at: Literal["step", "candidate"] = "step"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        self.branching()

    def branching(self) -> Branching:
        """The rollout that always goes on with the best."""
        return Branching(self.num_candidates, self.low, self.high, "best", self.score_at)


def search_latents(
    policy: Policy,
    reward: Reward,
    prompts: PromptBatch,
    candidates: Candidates,
    sampling: Sampling,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    """Finished latents ``(B, C, ...)``, float32, of a search with ``reward`` at each step of the window.

    Draws are those of :func:`~latentreward.rollout.candidate_steps`. A reward that asks for clean latents costs K
    evaluations of the network per step and not K + 1: the kept candidate's serves the next step.

    Args:
        policy: Generator, in evaluation mode.
        reward: Scores candidates.
        prompts: B prompts.
        candidates: K and the window.
        sampling: Steps, noise and size; the noise must not be 0; where none is given, it is that of rollouts.
        guidance_scale: 1 for no guidance.
        seed: Seed of every draw.

    Raises:
        InputError: If no step of the window has noise.
    """
    sampler, draws = sampling.with_noise().sampler(policy.scheduler_config), RolloutDraws(seed, prompts.keys)
    steps = candidate_steps(policy, sampler, reward, prompts, candidates.branching(), sampling, guidance_scale, draws)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return finished.value
