"""Halving: candidates of each prompt are scored at noisy states, and only some of them are sampled on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rewards.base import Reward, RewardSource, rows_of, score_states
from latentreward.alignment.rollout.samplers import Sampling
from latentreward.alignment.rollout.trajectories import Cut, PromptedPolicy, RolloutDraws, sample_pruned
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError, check_at_least_one


def check_states_reward(field: str, reward: RewardSource) -> None:
    """Raise InputError, before any weight is loaded, if a reward cannot score noisy states beside finished samples."""
    reward.require_step_scores(field)
    if reward.remembers():
        told = f"{field} scores noisy states too, which normalise: running would count"
        raise InputError(f"{told}; set normalise: group or none")


def scored_cut(reward: Reward, encoded: Any, prompts: PromptBatch, choose: Callable[[Tensor], Tensor]) -> Cut:
    """Return a cut that scores the states of each prompt's candidates and keeps those that ``choose`` returns.

    ``encoded`` are the prompts as the reward encodes them. ``choose`` gets scores ``(P, N)`` on the CPU and returns
    indices of candidates ``(P, K)`` int64.
    """

    def cut(states: Tensor, timestep: float) -> Tensor:
        scores = score_states(reward, encoded, states, rows_of(prompts, states), timestep)
        reward.take_means()  # those of a mixture's rewards are logged, and noisy states have none
        scores = scores.view(len(prompts), -1).cpu()
        return rows_of_choice(choose(scores).sort(dim=1).values, scores.shape[1])

    return cut


def rows_of_choice(chosen: Tensor, number: int) -> Tensor:
    """Return the rows ``(P·K,)`` of ``chosen`` ``(P, K)`` int64 among candidates, ``number`` of each prompt in turn."""
    return (chosen + number * torch.arange(len(chosen))[:, None]).flatten()


def best(count: int, scores: Tensor) -> Tensor:
    """Return the indices ``(P, count)`` of the highest of ``scores`` ``(P, N)``, the first of equals."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


@dataclass
class Halving:
    """Settings of halving: of N candidates of a prompt fewer and fewer are sampled on.

    Attributes:
        candidates: Number N of candidates of each prompt.
        keep: How many of them are kept, the ones with the highest scores, by the number of finished steps, where 0 is
            the noise. Those that are left after the last entry are finished.
    """

    candidates: int
    keep: Mapping[int, int]

    def check(self, steps: int) -> None:
        """Raise InputError if the settings do not fit a sampler of so many ``steps``."""
        check_at_least_one(best_of=self.candidates)
        if self.keep and self.candidates == 1:
            raise InputError("best_of=1 leaves keep nothing to choose from; set best_of to 2 or more")
        left = self.candidates
        for after, count in sorted(self.keep.items()):
            if not 0 <= after < steps:
                told = f"keep={dict(self.keep)}: the sampler has {steps} steps, and {after} is none of 0 (the noise)"
                raise InputError(f"{told} to {steps - 1}")
            if not 1 <= count <= left:
                told = f"keep={dict(self.keep)}: after {after} steps there are {left} candidates"
                raise InputError(f"{told}, of which 1 to {left} can be kept")
            left = count

    def sample(
        self,
        policy: Policy,
        reward: Reward,
        prompts: PromptBatch,
        sampling: Sampling,
        guidance_scale: float | None,
        seed: int,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample the candidates ``prompts.times(N)``, with ``batch_size`` of them at most in one forward pass.

        Returns:
            Finished latents ``(R, C, ...)``, float32, those of a prompt in turn, and their rows among the candidates,
            ``(R,)`` int64 on the CPU.
        """
        policy.edit_at(sampling.height, sampling.width)
        names, sampler = prompts.times(self.candidates), sampling.sampler(policy.family)
        network = PromptedPolicy.of(policy, names, guidance_scale, batch_size)
        cut = partial(scored_cut, reward, reward.encode_prompts(prompts.prompts), prompts)
        cuts = {after: cut(partial(best, count)) for after, count in self.keep.items()}
        taken, rows = sample_pruned(network, sampler, sampling, RolloutDraws(seed, names.keys), cuts, "finished")
        return taken.finished, rows
