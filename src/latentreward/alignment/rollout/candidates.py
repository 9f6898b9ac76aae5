"""Rollouts that sample and score several candidates for the next state, step by step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rewards.base import Reward, score_states
from latentreward.alignment.rollout.samplers import Sampling, StepSampler
from latentreward.alignment.rollout.trajectories import PromptedPolicy, RolloutDraws
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import check_choices, check_range


@dataclass
class Branching:
    """Settings for the candidates of a rollout: their number, the timesteps that have them, and how to go on.

    Attributes:
        num_candidates: Number K of candidates for the next state.
        low: Lowest timestep of the steps that sample and score candidates; other steps sample one state.
        high: Highest timestep of the steps that sample and score candidates; above 1000 for schedulers that have more.
        continue_from: Candidate with which the rollout goes on: a ``random`` one, the ``best`` or the ``worst``.
        score_at: Timestep that the reward gets: that of the state before the ``step`` (LPO), or the ``candidate``'s own
            (SPO).
    """

    num_candidates: int = 4
    low: float = 0.0
    high: float = 1000.0
    continue_from: Literal["random", "best", "worst"] = "random"
    score_at: Literal["step", "candidate"] = "step"

    def __post_init__(self) -> None:
        check_choices(Branching, continue_from=self.continue_from, score_at=self.score_at)
        check_range("[2, inf)", "one leaves nothing to compare", num_candidates=self.num_candidates)
        check_range(f"[-inf, {self.high}]", "exchange low and high", low=self.low)

    def steps(self, sampler: StepSampler) -> list[int]:
        """Return the indices of the steps with noise in the window [low, high]; raise InputError if there is none."""
        return sampler.noisy_steps(self.low, self.high)

    def training_steps(self, sampler: StepSampler) -> list[int]:
        """Return :meth:`steps` for a method that trains on them; raise InputError if there are fewer than two."""
        return sampler.noisy_steps(self.low, self.high, least=2)


@dataclass(frozen=True)
class CandidateStep:
    """Step of a rollout with K scored candidates for each of B prompts."""

    index: int  # Index of the step
    timestep: float  # Timestep of the states before the step
    latents: Tensor  # ``(B, C, ...)`` states x_t before the step, float32
    candidates: Tensor  # ``(K, B, C, ...)`` candidates for the next state, float32
    scores: Tensor  # ``(K, B)`` the candidates' rewards, float32
    log_prob: Tensor  # ``(K, B)`` log-probabilities under the policy that sampled the candidates, float32


def candidate_steps(
    policy: Policy,
    sampler: StepSampler,
    reward: Reward,
    prompts: PromptBatch,
    branching: Branching,
    sampling: Sampling,
    guidance_scale: float | None,
    draws: RolloutDraws,
) -> Generator[CandidateStep, None, Tensor]:
    """Sample from noise to the finished latents ``(B, C, ...)``, with K scored candidates at each step of the window.

    Yields a :class:`CandidateStep` for each of these. A reward with ``needs_clean`` also gets the policy's x̂_0 of each
    candidate; candidates of the last step are clean already. The caller sets ``policy.eval()`` and autocast.
    ``guidance_scale`` is as checked by :meth:`Family.guidance`.
    """
    window = branching.steps(sampler)
    policy.edit_at(sampling.height, sampling.width)
    with torch.no_grad():
        network, encoded = PromptedPolicy.of(policy, prompts, guidance_scale), reward.encode_prompts(prompts.prompts)
    shape, rows = sampling.latent_shape(policy.family), torch.arange(len(prompts))
    latents = draws.initial(shape).to(network.device)
    output: Tensor | None = None
    for index, timestep in sampler.steps():
        with torch.no_grad():  # left before each yield, so that the caller's gradient mode is unchanged
            if output is None:
                output = network(latents, timestep)
            # One Gaussian for all K candidates: the network is evaluated at the state before the step alone.
            transition = sampler.transition(latents, output, torch.full((len(prompts),), timestep))
            if index not in window:
                latents, output = transition.sample(draws.noise(index, 1, shape)[0]), None
                continue
            candidates = transition.sample(draws.noise(index, branching.num_candidates, shape))
            # SPO's reward reads pictures, so the network is also evaluated at each candidate.
            clean, outputs = _finished(network, sampler, candidates, index) if reward.needs_clean else (None, None)
            # LPO scores at the timestep of the state before, as released; SPO at that of the candidate.
            scored_at = timestep if branching.score_at == "step" else sampler.next_timestep(index)
            flat, repeated = candidates.flatten(0, 1), rows.repeat(branching.num_candidates)  # prompts innermost
            scores = score_states(reward, encoded, flat, repeated, scored_at, clean).view(-1, len(prompts))
            log_prob = transition.log_prob(candidates)
        yield CandidateStep(index, timestep, latents, candidates, scores, log_prob)
        if branching.continue_from == "random":
            choice = draws.choice(index, branching.num_candidates)
        else:
            choice = (scores.argmax(dim=0) if branching.continue_from == "best" else scores.argmin(dim=0)).cpu()
        latents = candidates[choice, rows]
        # The pass that predicted x̂_0 of this candidate is the next step's: SPO would otherwise pay it twice.
        output = None if outputs is None else outputs[choice, rows]
    return latents


def _finished(
    network: PromptedPolicy, sampler: StepSampler, candidates: Tensor, index: int
) -> tuple[Tensor, Tensor | None]:
    """Predict the candidates' clean latents ``(K·B, C, ...)``; also return the output ``(K, B, C, ...)`` for reuse."""
    flat = candidates.flatten(0, 1)
    if index + 1 == len(sampler):
        return flat, None
    timestep = sampler.next_timestep(index)
    output = network(flat, timestep)
    return sampler.clean(flat, output, torch.full((len(flat),), timestep)), output.view_as(candidates)
