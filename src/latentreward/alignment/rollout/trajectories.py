"""Sampling of whole trajectories, with one state per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rollout.prompted import PromptedPolicy, RolloutDraws
from latentreward.alignment.rollout.samplers import StepSampler
from latentreward.alignment.rollout.settings import Sampling
from latentreward.core.contracts import PromptBatch


@dataclass(frozen=True)
class Trajectories:
    """States and log-probabilities of B trajectories of T steps.

    Attributes:
        latents: ``(T + 1, B, C, ...)`` float32: initial noise first, finished latents last.
        timesteps: ``(T,)`` float32 on the CPU: timestep of the state before each step.
        log_prob: ``(T, B)`` float32: log-probability of each step under the policy that sampled the step; 0 for
            deterministic steps.
        means: ``(T, B, C, ...)`` mean of each step under the policy that sampled it, without guidance by a reward; None
            unless they were asked for.
    """

    latents: Tensor
    timesteps: Tensor
    log_prob: Tensor
    means: Tensor | None = None

    @property
    def finished(self) -> Tensor:
        """Return the finished latents ``(B, C, ...)``."""
        return self.latents[-1]

    def select(self, rows: Tensor) -> Trajectories:
        """Return the trajectories of ``rows`` ``(n,)`` int64."""
        latents, log_prob = self.latents[:, rows], self.log_prob[:, rows]
        means = None if self.means is None else self.means[:, rows]
        return replace(self, latents=latents, log_prob=log_prob, means=means)

    @classmethod
    def join(cls, parts: Sequence[Trajectories]) -> Trajectories:
        """Join at least one batch of trajectories of the same steps."""
        if len(parts) == 1:
            return parts[0]
        means = [part.means for part in parts if part.means is not None]
        return replace(
            parts[0],
            latents=torch.cat([part.latents for part in parts], dim=1),
            log_prob=torch.cat([part.log_prob for part in parts], dim=1),
            means=torch.cat(means, dim=1) if means else None,
        )


@torch.no_grad()
def sample_trajectories(
    policy: Policy,
    sampler: StepSampler,
    prompts: PromptBatch,
    sampling: Sampling,
    guidance_scale: float | None,
    seed: int,
    *,
    draws: RolloutDraws | None = None,
    keep_means: bool = False,
) -> Trajectories:
    """Sample from noise to the finished latents, and keep every state.

    The caller sets ``policy.eval()`` and autocast. ``guidance_scale`` is as checked by :meth:`Family.guidance`;
    ``draws`` replace the random numbers from ``seed``; ``keep_means`` keeps the mean of each step.
    """
    policy.edit_at(sampling.height, sampling.width)
    network, draws = PromptedPolicy.of(policy, prompts, guidance_scale), draws or RolloutDraws(seed, prompts.keys)
    start = draws.initial(sampling.latent_shape(policy.family)).to(network.device)
    return _sample_steps(network, sampler, sampler.steps(), start, draws, keep_means)


@torch.no_grad()
def sample_pruned(
    policy: Policy,
    sampler: StepSampler,
    prompts: PromptBatch,
    sampling: Sampling,
    guidance_scale: float | None,
    seed: int,
    prune: tuple[int, Callable[[Tensor, float], Tensor]],
    keep_means: bool = False,
) -> tuple[Trajectories, Tensor]:
    """Sample as :func:`sample_trajectories` does, but go on with some of the samples alone.

    ``prune`` is the number of steps, at least 1, after which samples are left out, and the function that is then called
    with their states ``(B, C, ...)`` and timestep and returns the rows to keep, int64 ``(n,)`` on the CPU.

    Returns:
        The n trajectories, with all their steps, and their rows.
    """
    policy.edit_at(sampling.height, sampling.width)
    network, draws = PromptedPolicy.of(policy, prompts, guidance_scale), RolloutDraws(seed, prompts.keys)
    start, steps = draws.initial(sampling.latent_shape(policy.family)).to(network.device), sampler.steps()
    first = _sample_steps(network, sampler, islice(steps, prune[0]), start, draws, keep_means)
    rows = prune[1](first.finished, sampler.next_timestep(prune[0] - 1))
    first, kept = first.select(rows.to(network.device)), prompts.select(rows.tolist())
    draws = RolloutDraws(seed, kept.keys)
    rest = _sample_steps(network.select(rows), sampler, steps, first.finished, draws, keep_means)
    whole = replace(
        first,
        latents=torch.cat([first.latents, rest.latents[1:]]),
        log_prob=torch.cat([first.log_prob, rest.log_prob]),
        means=None if first.means is None or rest.means is None else torch.cat([first.means, rest.means]),
    )
    return whole, rows


def _sample_steps(
    network: PromptedPolicy,
    sampler: StepSampler,
    steps: Iterable[tuple[int, float]],
    start: Tensor,
    draws: RolloutDraws,
    keep_means: bool,
) -> Trajectories:
    """Sample ``steps`` of ``sampler``, one after the other, from the states ``start`` ``(B, C, ...)``."""
    means: list[Tensor] = []
    states, log_probs = [start], []
    noisy, shape = (sampler.noise_std > 0).tolist(), tuple(start.shape[1:])
    for index, timestep in steps:
        output = network(states[-1], timestep)
        transition = sampler.transition(states[-1], output, torch.full((len(output),), timestep))
        if keep_means:
            means.append(transition.mean)
        # A step without noise has no density, and the log of its standard deviation is −∞.
        if noisy[index]:
            states.append(transition.sample(draws.noise(index, 1, shape)[0]))
            log_probs.append(transition.log_prob(states[-1]))
        else:
            states.append(transition.mean)
            log_probs.append(torch.zeros_like(transition.std))
    kept = torch.stack(means) if keep_means else None
    return Trajectories(torch.stack(states), sampler.timesteps, torch.stack(log_probs), kept)


@torch.no_grad()
def sample_latents(
    policy: Policy,
    prompts: PromptBatch,
    sampling: Sampling,
    guidance_scale: float | None,
    seed: int,
    reference: bool = False,
    *,
    draws: RolloutDraws | None = None,
) -> Tensor:
    """Sample finished latents ``(B, C, ...)``, float32; with noise 0 or None, only the initial noise is random.

    See :func:`sample_trajectories`; ``reference`` takes the network as it was before alignment.
    """
    sampler = sampling.sampler(policy.family)
    with policy.reference() if reference else nullcontext():
        sampled = (policy, sampler, prompts, sampling, guidance_scale, seed)
        # A view would keep the states of all steps in memory.
        return sample_trajectories(*sampled, draws=draws).finished.clone()
