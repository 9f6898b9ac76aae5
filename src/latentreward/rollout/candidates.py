"""Several next states from one state, scored, step by step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from latentreward.contracts import NoisyStates, PromptBatch
from latentreward.errors import InputError
from latentreward.policies import Policy
from latentreward.rewards.base import Reward
from latentreward.rollout.base import StepSampler
from latentreward.rollout.prompted import PromptedPolicy
from latentreward.rollout.rollout_noise import RolloutDraws
from latentreward.rollout.settings import Sampling


@dataclass
class Branching:
    """Where a rollout draws several candidates, and with which of them it goes on.

    Attributes:
        num_candidates: Candidates K for the next state.
        low: Least timestep at which candidates are drawn and scored; below it one state is drawn.
        high: Greatest such timestep.
        continue_from: Candidate that the rollout goes on with: a random one, the best or the worst.
        score_at: Timestep that the reward is told: ``step``, the one that the step starts from (LPO), or ``candidate``,
            the one at which candidates lie (SPO).
    """

    num_candidates: int = 4
    low: float = 0.0
    high: float = 1000.0
    continue_from: Literal["random", "best", "worst"] = "random"
    score_at: Literal["step", "candidate"] = "step"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.num_candidates < 2:
            raise InputError(f"num_candidates={self.num_candidates} leaves nothing to compare; use at least 2")
        if not self.low <= self.high:
            raise InputError(f"low={self.low:g} lies above high={self.high:g}; exchange them")

    def steps(self, sampler: StepSampler) -> list[int]:
        """Numbers of the steps with candidates: inside the window, and with noise that tells candidates apart.

        Raises:
            InputError: If there is none.
        """
        sampler.require_noise()
        inside = (sampler.timesteps >= self.low) & (sampler.timesteps <= self.high) & (sampler.noise_std > 0)
        if not inside.any():
            raise InputError(
                f"no step with noise lies in the window low={self.low:g}, high={self.high:g}; the {len(sampler)} "
                f"timesteps are {sampler.timesteps[0].item():g} to {sampler.timesteps[-1].item():g}: widen it"
            )
        return inside.nonzero().flatten().tolist()


@dataclass(frozen=True)
class CandidateStep:
    """One step with candidates.

    Attributes:
        index: Number of the step.
        timestep: Timestep that it starts from.
        latents: ``(B, C, ...)`` the states x_t, float32.
        candidates: ``(K, B, C, ...)`` the next states, float32.
        scores: ``(K, B)`` float32.
        log_prob: ``(K, B)`` under the policy that drew them, float32.
    """

    index: int
    timestep: float
    latents: Tensor
    candidates: Tensor
    scores: Tensor
    log_prob: Tensor


def candidate_steps(
    policy: Policy,
    sampler: StepSampler,
    reward: Reward,
    prompts: PromptBatch,
    branching: Branching,
    sampling: Sampling,
    guidance_scale: float,
    draws: RolloutDraws,
) -> Generator[CandidateStep, None, Tensor]:
    """Sample from noise to the finished latents, with K scored candidates at each step of the window.

    Outside the window one next state is drawn and nothing scored. A reward with ``needs_clean`` is given the policy's
    x̂_0 of each candidate (of the last step's candidates: themselves); the network's output for the candidate that the
    rollout goes on with is then the output of its next step, so that each state is evaluated once.

    Args:
        policy: Generator; ``policy.eval()`` and autocast are the caller's.
        sampler: ``sampling.sampler(policy.scheduler_config)``.
        reward: Scores candidates.
        prompts: B prompts.
        branching: Window, K, and how to go on.
        sampling: Size of the samples.
        guidance_scale: 1 for no guidance.
        draws: Initial latents, noise of the steps and choices among candidates.

    Yields:
        The steps of the window, in order.

    Returns:
        The finished latents ``(B, C, ...)``, float32.

    Raises:
        InputError: If no step of the window has noise, or the reward returns what is no score.
    """
    window = branching.steps(sampler)
    with torch.no_grad():
        network, encoded = PromptedPolicy.of(policy, prompts, guidance_scale), reward.encode_prompts(prompts.prompts)
    shape, rows = policy.latent_shape(sampling.height, sampling.width), torch.arange(len(prompts))
    latents = draws.initial(shape).to(network.device)
    output: Tensor | None = None
    for index, timestep in enumerate(sampler.timesteps.tolist()):
        with torch.no_grad():  # left before each yield: the caller's grad mode is the caller's
            if output is None:
                output = network(latents, timestep)
            transition = sampler.transition(latents, output, torch.full((len(prompts),), timestep))
            if index not in window:
                latents, output = transition.sample(draws.noise(index, 1, shape)[0]), None
                continue
            candidates = transition.sample(draws.noise(index, branching.num_candidates, shape))
            clean, outputs = _finished(network, sampler, candidates, index) if reward.needs_clean else (None, None)
            told = timestep if branching.score_at == "step" else sampler.next_timestep(index)
            scores = _score(reward, encoded, candidates, clean, told)
            log_prob = transition.log_prob(candidates)
        yield CandidateStep(index, timestep, latents, candidates, scores, log_prob)
        if branching.continue_from == "random":
            choice = draws.choice(index, branching.num_candidates)
        else:
            choice = (scores.argmax(dim=0) if branching.continue_from == "best" else scores.argmin(dim=0)).cpu()
        latents = candidates[choice, rows]
        output = None if outputs is None else outputs[choice, rows]
    return latents


def _finished(
    network: PromptedPolicy, sampler: StepSampler, candidates: Tensor, index: int
) -> tuple[Tensor, Tensor | None]:
    """Clean latents ``(K·B, C, ...)`` that the policy sees in the candidates, and its output ``(K, B, C, ...)``."""
    flat = candidates.flatten(0, 1)
    if index + 1 == len(sampler):
        return flat, None
    timestep = sampler.next_timestep(index)
    output = network(flat, timestep)
    return sampler.clean(flat, output, torch.full((len(flat),), timestep)), output.view_as(candidates)


def _score(reward: Reward, encoded: Any, candidates: Tensor, clean: Tensor | None, timestep: float) -> Tensor:
    """Scores ``(K, B)``; candidates go to the reward in one batch, prompts innermost."""
    count, prompts = candidates.shape[:2]
    timesteps = torch.full((count * prompts,), timestep, device=candidates.device)
    rows = torch.arange(prompts, device=candidates.device).repeat(count)
    scores: Tensor = reward(NoisyStates(candidates.flatten(0, 1), timesteps, rows, clean), encoded)
    return scores.view(count, prompts)
