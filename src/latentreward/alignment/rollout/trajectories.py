"""Sampling of whole trajectories, with one state per step, for prompts that are encoded once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rollout.samplers import Sampling, StepSampler
from latentreward.core.contracts import Conditioning, PromptBatch
from latentreward.core.errors import InputError, quoted
from latentreward.core.running import pair_generator


class RolloutDraws:
    """Random numbers that depend only on seed, a prompt's key and step, not on batch, rank or device."""

    def __init__(self, seed: int, keys: Sequence[str]) -> None:
        self._seed, self._keys = seed, tuple(keys)

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal initial latents ``(B, *shape)``, float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators("rollout start")])

    def noise(self, index: int, count: int, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal noise ``(count, B, *shape)`` for step ``index``, float32 on the CPU."""
        generators = self._generators("rollout noise", index)
        return torch.stack([torch.randn((count, *shape), generator=g) for g in generators], dim=1)

    def choice(self, index: int, count: int) -> Tensor:
        """Draw the index of one of ``count`` candidates per prompt after step ``index``: ``(B,)`` int64 on the CPU."""
        return torch.cat([torch.randint(count, (1,), generator=g) for g in self._generators("rollout choice", index)])

    def select(self, rows: Tensor) -> RolloutDraws:
        """Return the random numbers of the prompts of ``rows``."""
        return RolloutDraws(self._seed, [self._keys[row] for row in rows.tolist()])

    def _generators(self, purpose: str, index: int = 0) -> list[torch.Generator]:
        # By key, never by place in a batch: a rollout is equal on any number of ranks, and after a resume.
        return [pair_generator(self._seed, purpose, 0, key, f"step {index}") for key in self._keys]


@dataclass(frozen=True)
class PriorNoise:
    """Noise that a sample was drawn from, by what draws it again; its text is kept with the finished picture."""

    seed: int  # Seed of the draw
    key: str  # Key of the prompt, which no other sample of the run has
    shape: tuple[int, ...]  # Shape ``(C, ...)`` of the latents

    def __str__(self) -> str:
        return f"{self.seed} {self.key} {'x'.join(map(str, self.shape))}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of a noise; raise InputError if it is none."""
        if (found := re.fullmatch(r"(-?\d{1,20}) (\S+) (\d{1,9}(?:x\d{1,9})+)", text)) is None:
            raise InputError(f"{quoted(text)} names no noise; give the column of latentreward generate's table")
        return cls(int(found[1]), found[2], tuple(map(int, found[3].split("x"))))

    def draw(self) -> Tensor:
        """Draw the noise ``(C, ...)`` again, float32 on the CPU, as rollouts draw it."""
        return RolloutDraws(self.seed, [self.key]).initial(self.shape)[0]


@dataclass(frozen=True)
class PromptedPolicy:
    """Guided network of a policy for B prompts, which are encoded once."""

    policy: Policy  # The generator
    conditioning: Conditioning  # Encoded prompts, B rows
    # Encoded empty prompt, one row, or B where it depends on a row's sources; None without guidance
    uncond: Conditioning | None
    guidance_scale: float | None  # Scale as checked by :meth:`Family.guidance`; None for networks without guidance
    batch_size: int | None = None  # Most latents of one forward pass; None takes all at once
    _packed: dict[int, Conditioning] = field(default_factory=dict, init=False, repr=False)  # number of rows → prompts

    @classmethod
    def of(
        cls, policy: Policy, prompts: PromptBatch, guidance_scale: float | None, batch_size: int | None = None
    ) -> PromptedPolicy:
        """Encode the prompts, and the empty prompt if the guidance needs it."""
        uncond = policy.encode_uncond(prompts.prompts) if policy.family.needs_uncond(guidance_scale) else None
        return cls(policy, policy.encode_prompts(prompts.prompts), uncond, guidance_scale, batch_size)

    def select(self, rows: Tensor) -> PromptedPolicy:
        """Return the network for the prompts of ``rows`` ``(N,)`` int64, in any number and order."""
        return replace(self, conditioning=self.conditioning.select(rows), uncond=self._uncond(rows))

    def _uncond(self, rows: Tensor | list[int]) -> Conditioning | None:
        """Return the empty prompt for the given rows; it is one row for all unless it depends on a row's sources."""
        return self.uncond and self.uncond.empty_for(rows)

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return next(self.policy.network.parameters()).device

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Predict for ``latents`` ``(N, C, ...)``, all at one timestep; N is a multiple of B, prompts innermost."""
        count, prompts = len(latents), len(self.conditioning)
        if self.batch_size is not None and count > self.batch_size:
            rows = (torch.arange(count) % prompts).split(self.batch_size)
            parts = zip(rows, latents.split(self.batch_size), strict=True)
            return torch.cat([self.select(own)(part, timestep) for own, part in parts])
        if count not in self._packed:  # text of many tokens: copied once, not at each timestep
            rows = [*range(prompts)] * (count // prompts)
            every = self.conditioning if count == prompts else self.conditioning.select(rows)
            self._packed[count] = self.policy.with_uncond(every, self._uncond(rows), self.guidance_scale)
        timesteps = torch.full((count,), timestep, device=latents.device)
        return self.policy.predict_packed(latents, timesteps, self._packed[count], self.guidance_scale)


@dataclass(frozen=True)
class Trajectories:
    """States and log-probabilities of B trajectories of T steps."""

    # ``(T + 1, B, C, ...)`` float32: initial noise first, finished latents last; ``(1, B, C, ...)`` of these alone
    latents: Tensor
    timesteps: Tensor  # ``(T,)`` float32 on the CPU: timestep of the state before each step
    # ``(T, B)`` float32: log-probability of each step under the policy that sampled the step; 0 for deterministic
    # steps
    log_prob: Tensor
    # ``(T, B, C, ...)`` mean of each step under the policy that sampled it, without guidance by a reward; None
    # unless they were asked for
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


Cut = Callable[[Tensor, float], Tensor]
"""Function that returns the rows to keep, int64 ``(n,)`` on the CPU, of states ``(B, C, ...)`` at a timestep."""
Kept = Literal["finished", "states", "means"]
"""What is kept of trajectories: the finished latents, all states, or these and the means of all steps."""


def sample_trajectories(
    policy: Policy,
    sampler: StepSampler,
    prompts: PromptBatch,
    sampling: Sampling,
    guidance_scale: float | None,
    seed: int,
    *,
    draws: RolloutDraws | None = None,
    kept: Kept = "states",
) -> Trajectories:
    """Sample from noise to the finished latents, and keep every state; see :func:`sample_pruned`.

    ``guidance_scale`` is as checked by :meth:`Family.guidance`. ``draws`` replace the random numbers from ``seed``.
    """
    policy.edit_at(sampling.height, sampling.width)
    network, draws = PromptedPolicy.of(policy, prompts, guidance_scale), draws or RolloutDraws(seed, prompts.keys)
    return sample_pruned(network, sampler, sampling, draws, {}, kept)[0]


@torch.no_grad()
def sample_pruned(
    network: PromptedPolicy,
    sampler: StepSampler,
    sampling: Sampling,
    draws: RolloutDraws,
    cuts: Mapping[int, Cut],
    kept: Kept = "states",
) -> tuple[Trajectories, Tensor]:
    """Sample from noise to the finished latents; go on with some samples alone, and return their rows.

    The caller sets ``policy.eval()`` and autocast. ``cuts`` maps numbers of finished steps, from 0 (the noise) to all
    but the last, to functions that choose; ``sampler`` should then not know rows, as :class:`GuidedSampler` does.
    """
    rows = torch.arange(len(network.conditioning))
    shape, noisy = sampling.latent_shape(network.policy.family), (sampler.noise_std > 0).tolist()
    states, log_probs, means = [draws.initial(shape).to(network.device)], list[Tensor](), list[Tensor]()
    with network.policy.adapters.merged():
        for index, timestep in sampler.steps():
            if index in cuts:
                chosen = cuts[index](states[-1], timestep)
                network, draws, rows = network.select(chosen), draws.select(chosen), rows[chosen]
                there = chosen.to(network.device)
                states, log_probs, means = ([one[there] for one in some] for some in (states, log_probs, means))
            output = network(states[-1], timestep)
            transition = sampler.transition(states[-1], output, torch.full((len(output),), timestep))
            # A step without noise has no density, and the log of its standard deviation is −∞.
            following, log_prob = transition.mean, torch.zeros_like(transition.std)
            if noisy[index]:
                following = transition.sample(draws.noise(index, 1, shape)[0])
                log_prob = transition.log_prob(following)
            if kept == "means":
                means.append(transition.mean)
            if kept == "finished":
                states.clear()
            states.append(following)
            log_probs.append(log_prob)
    stacked = torch.stack(states), sampler.timesteps, torch.stack(log_probs), torch.stack(means) if means else None
    return Trajectories(*stacked), rows


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
    """Sample finished latents ``(B, C, ...)``, float32; ``reference`` takes the network as it was before alignment."""
    sampler = sampling.sampler(policy.family)
    with policy.reference() if reference else nullcontext():
        sampled = (policy, sampler, prompts, sampling, guidance_scale, seed)
        return sample_trajectories(*sampled, draws=draws, kept="finished").finished
