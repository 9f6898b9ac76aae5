"""Sampling of whole trajectories, with one state per step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentreward.contracts import PromptBatch
from latentreward.policies import Policy
from latentreward.rollout.prompted import PromptedPolicy, RolloutDraws
from latentreward.rollout.samplers import StepSampler
from latentreward.rollout.settings import Sampling


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
    network, draws = PromptedPolicy.of(policy, prompts, guidance_scale), draws or RolloutDraws(seed, prompts.keys)
    shape = sampling.latent_shape(policy.family)
    means: list[Tensor] = []
    states, log_probs = [draws.initial(shape).to(network.device)], []
    noisy = (sampler.noise_std > 0).tolist()
    for index, timestep in sampler.steps():
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
