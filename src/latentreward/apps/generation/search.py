"""Searches with a reward in our own sampling loop: best of N samples, of K states at each step, of a population."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentreward.alignment import (
    Branching,
    Policy,
    PromptedPolicy,
    Reward,
    RolloutDraws,
    Sampling,
    candidate_steps,
    score_finished,
    score_states,
)
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError, check_range


@dataclass
class Candidates:
    """Settings of step-wise search: draw K next states at each step of a window, and continue from the best.

    Attributes:
        num_candidates: Candidates K per step, at least 2.
        low: Lowest timestep with a search; outside ``low`` to ``high`` one next state is drawn and not scored.
        high: Highest timestep with a search.
        score_at: Timestep passed to the reward: ``step`` is the timestep that the step starts from (LPO),
            ``candidate`` the timestep of the candidates (SPO).
    """

    num_candidates: int = 4
    low: float = 0.0
    high: float = 1000.0
    score_at: Literal["step", "candidate"] = "step"

    def __post_init__(self) -> None:
        """Check the settings."""
        self.branching()

    def branching(self) -> Branching:
        """Return the settings of a rollout that always continues from the best candidate."""
        return Branching(self.num_candidates, self.low, self.high, "best", self.score_at)


def search_latents(
    policy: Policy,
    reward: Reward,
    prompts: PromptBatch,
    candidates: Candidates,
    sampling: Sampling,
    guidance_scale: float | None,
    seed: int,
) -> Tensor:
    """Sample finished latents ``(B, C, ...)``, float32, with a search by ``reward`` at each step of the window.

    The random numbers are those of :func:`~latentreward.alignment.candidate_steps`. For a reward with ``needs_clean``
    the network is evaluated on each of the K candidates. The output for the kept candidate is reused in the next step,
    so that a searched step costs K evaluations instead of K + 1.

    Args:
        policy: Policy in evaluation mode.
        reward: Reward for the candidates.
        prompts: B prompts.
        candidates: K and the window.
        sampling: Steps, noise and size. A noise of None takes the default of rollouts, ``eta`` 1 or ``noise_level``
            0.7; a noise of 0 is refused.
        guidance_scale: Scale as checked by :meth:`Family.guidance`.
        seed: Seed of all random numbers.
    """
    sampler, draws = sampling.with_noise().sampler(policy.family), RolloutDraws(seed, prompts.keys)
    steps = candidate_steps(policy, sampler, reward, prompts, candidates.branching(), sampling, guidance_scale, draws)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return finished.value


@torch.no_grad()
def best_of_n(
    sample: Callable[[PromptBatch], Tensor],
    reward: Reward,
    prompts: PromptBatch,
    number: int,
    *,
    seed: int = 0,
    sigmas: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Sample ``number`` times for each prompt and keep the samples with the highest scores.

    The n-th sample of a prompt is drawn under the key ``KEY/n``. A search with a larger ``number`` therefore contains
    all samples of a search with a smaller one. All samples are scored in one call, since some rewards compare the
    samples of a prompt (``RewardMixture`` with ``normalise: group``).

    Args:
        sample: Function that samples finished latents ``(B, C, ...)`` for B prompts, e.g.
            ``partial(sample_latents, policy, ...)``.
        reward: Reward for finished latents.
        prompts: B prompts.
        number: Samples N per prompt, at least 1.
        seed: Seed of the noise that a latent reward adds before it scores, see
            :func:`~latentreward.alignment.score_finished`; all samples of a prompt get the same noise.
        sigmas: Noise levels in [0, 1] of a latent reward; rewards on pixels ignore them.

    Returns:
        Finished latents ``(B, C, ...)`` of the best sample of each prompt, the first one of equals; and the scores
        ``(N, B)`` of all samples, on the CPU.
    """
    samples = [sample(PromptBatch(prompts.prompts, tuple(f"{key}/{n}" for key in prompts.keys))) for n in range(number)]
    by_prompt = torch.stack(samples, dim=1)
    scores = score_finished(reward, by_prompt.flatten(0, 1), prompts, seed, sigmas).view(len(prompts), number)
    rows = torch.arange(len(prompts), device=by_prompt.device)
    return by_prompt[rows, scores.argmax(dim=1).to(by_prompt.device)], scores.T.cpu()


@dataclass
class Population:
    r"""Settings of population search (LatSearch, arXiv:2603.14526).

    A population of N starts is :math:`z` and :math:`\sqrt{1 - b^2}\,z + b\,\varepsilon_k`, k = 1 … N − 1. After some
    steps a latent reward scores all n members at their own noise level. Weights w = softmax(s / T) are added to each
    member's sum of weights, n members are drawn with replacement in proportion to w, and those that were drawn go on,
    each once. So a population only shrinks. After the last of these steps only the member with the largest sum goes on.

    Attributes:
        size: Number N of starts, at least 2; 6 in LatSearch.
        perturbation: b in (0, 1]; 0.1 in LatSearch. At 1 the starts are independent.
        after_steps: Numbers of finished steps after which the population is scored, increasing. LatSearch: 10, 15 and
            20 of 50; the default are the same shares of 20.
        temperature: T, in units of the reward; 1 in LatSearch, for a sum of three scores.

    Note:
        Weights are normalised over the members that are left, so each search weighs more the fewer there are.
        LatSearch's released code draws from the global generator; here each prompt has a generator of its own.
    """

    size: int = 6
    perturbation: float = 0.1
    after_steps: Sequence[int] = (4, 6, 8)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Raise InputError for settings that are out of range."""
        check_range("[2, inf)", "one leaves nothing to choose", size=self.size)
        check_range("(0, 1]", "LatSearch uses 0.1", perturbation=self.perturbation)
        check_range("(0, inf)", "LatSearch uses 1", temperature=self.temperature)
        steps = list(self.after_steps)
        if not steps or steps[0] < 1 or steps != sorted(set(steps)):
            raise InputError(f"after_steps={steps} must be at least one number of steps, from 1 on, increasing")

    def check(self, sampling: Sampling) -> None:
        """Raise InputError if the population would be scored when the samples are finished, or never."""
        most = sampling.num_inference_steps - 1
        if self.after_steps[-1] > most:
            raise InputError(
                f"after_steps={list(self.after_steps)} goes beyond step {most}, the last one that leaves noise for a "
                f"latent reward when sampling.num_inference_steps={most + 1}; use fewer, or raise it"
            )

    def starts(self, parent: Tensor, noise: Tensor) -> Tensor:
        """Return the starts ``(B, N, C, ...)`` of z ``(B, C, ...)`` and ε ``(B, N - 1, C, ...)``; z is the first."""
        near = math.sqrt(1 - self.perturbation**2) * parent[:, None] + self.perturbation * noise
        return torch.cat([parent[:, None], near], dim=1)

    def weights(self, scores: Tensor) -> Tensor:
        """Return softmax(s / T) of the scores ``(n,)`` of a population."""
        return torch.softmax((scores - scores.max()).double() / self.temperature, dim=0).float()


def survivors(weights: Tensor, cumulative: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the members that were drawn, in order and each once, and their sums of weights.

    Members have ``weights`` ``(n,)`` now and ``cumulative`` ``(n,)`` sums of earlier weights; ``drawn`` ``(n,)`` int64
    are indices that were drawn with replacement.
    """
    kept = drawn.unique()
    return kept, (cumulative + weights)[kept]


@torch.no_grad()
def search_population(
    policy: Policy,
    reward: Reward,
    prompts: PromptBatch,
    population: Population,
    sampling: Sampling,
    guidance_scale: float | None,
    seed: int,
) -> Tensor:
    """Sample finished latents ``(B, C, ...)``, float32, with a population search by ``reward`` for each prompt.

    A population of one member is not scored any more. The first start is the one of
    :func:`~latentreward.alignment.sample_latents`.

    Args:
        policy: Policy in evaluation mode; its network evaluates up to B·N states at once.
        reward: Reward that scores noisy states.
        prompts: B prompts.
        population: Starts, and when they are scored.
        sampling: Steps, noise and size; a noise of None is 0.
        guidance_scale: Scale as checked by :meth:`Family.guidance`.
        seed: Seed of all random numbers, which depend on a prompt's key, not on other prompts.
    """
    population.check(sampling)
    sampler, draws = sampling.sampler(policy.family), RolloutDraws(seed, prompts.keys)
    prompted, encoded = PromptedPolicy.of(policy, prompts, guidance_scale), reward.encode_prompts(prompts.prompts)
    shape, size = sampling.latent_shape(policy.family), population.size
    members = [key if not k else f"{key}/near {k}" for key in prompts.keys for k in range(size)]
    drawn = RolloutDraws(seed, members).initial(shape).unflatten(0, (-1, size))
    latents = population.starts(drawn[:, 0], drawn[:, 1:]).flatten(0, 1).to(prompted.device)
    rows, cumulative = torch.arange(len(prompts)).repeat_interleave(size), torch.zeros(len(members))
    network = prompted.select(rows)
    for index, timestep in enumerate(sampler.timesteps.tolist()):
        transition = sampler.transition(latents, network(latents, timestep), torch.full((len(rows),), timestep))
        latents = transition.mean
        if sampler.noise_std[index]:
            latents = transition.sample(RolloutDraws(seed, members).noise(index, 1, shape)[0])
        if index + 1 not in population.after_steps:
            continue
        several = torch.bincount(rows)[rows] > 1
        scores = torch.zeros(len(rows))
        if several.any():
            states, told = latents[several.to(latents.device)], sampler.next_timestep(index)
            scores[several] = score_states(reward, encoded, states, rows[several], told).cpu()
        sizes = torch.bincount(rows).tolist()
        weights = [population.weights(part) for part in scores.split(sizes)]
        kept, sums = [], []
        earlier, places = cumulative.split(sizes), torch.arange(len(rows)).split(sizes)
        parts = zip(weights, earlier, places, draws.resampled(index, weights), strict=True)
        for weight, before, place, indices in parts:
            chosen, total = survivors(weight, before, indices)
            if index + 1 == population.after_steps[-1]:
                chosen, total = chosen[total.argmax()][None], total.max()[None]
            kept.append(place[chosen])
            sums.append(total)
        keep, cumulative = torch.cat(kept), torch.cat(sums)
        latents, rows, members = latents[keep.to(latents.device)], rows[keep], [members[member] for member in keep]
        network = prompted.select(rows)
    return latents
