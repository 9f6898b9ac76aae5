"""Population search: sample from several starts near one, and let a reward decide during sampling which go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentreward.alignment import Policy, PromptedPolicy, Reward, RolloutDraws, Sampling, score_states
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError, check_range


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
