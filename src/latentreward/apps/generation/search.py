"""Searches with a reward in our own sampling loop: the best of N samples, also halved, and of K states at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from latentreward.alignment import (
    Branching,
    Halving,
    Policy,
    PolicySource,
    Reward,
    RewardGuidance,
    RewardSource,
    RolloutDraws,
    Sampling,
    candidate_steps,
    sample_guided,
    sample_latents,
    score_finished,
    warn_of_another_policy,
)
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.alignment.rollout.halving import check_states_reward, rows_of_choice
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError


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

    The random numbers are those of :func:`~latentreward.alignment.candidate_steps`. A noise of None in ``sampling``
    takes the default of rollouts, ``eta`` 1 or ``noise_level`` 0.7; a noise of 0 is refused. For a reward with
    ``needs_clean`` the network is evaluated on each of the K candidates. The output for the kept candidate is reused in
    the next step, so that a searched step costs K evaluations instead of K + 1.
    """
    sampler, draws = sampling.with_noise().sampler(policy.family), RolloutDraws(seed, prompts.keys)
    steps = candidate_steps(policy, sampler, reward, prompts, candidates.branching(), sampling, guidance_scale, draws)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return finished.value


class Chosen(NamedTuple):
    """Finished samples of B prompts, one of each."""

    latents: Tensor  # ``(B, C, ...)``
    names: PromptBatch  # B prompts, with the keys that the samples were drawn under
    scores: Tensor | None = None  # ``(K, B)`` scores of all K finished samples of each prompt, on the CPU


@torch.no_grad()
def best_of_n(
    sample: Callable[[PromptBatch], Tensor],
    reward: Reward,
    prompts: PromptBatch,
    number: int,
    *,
    seed: int = 0,
    sigmas: Sequence[float] = (),
    batch_size: int | None = None,
) -> Chosen:
    """Sample ``number`` times for each prompt and keep the samples with the highest scores.

    The n-th sample of a prompt is drawn under the key ``KEY/n``. A search with a larger ``number`` therefore contains
    all samples of a search with a smaller one.

    Args:
        sample: Function that samples finished latents ``(B, C, ...)`` for B prompts, e.g.
            ``partial(sample_latents, policy, ...)``.
        reward: Reward for finished latents.
        prompts: B prompts.
        number: Samples N per prompt, at least 1.
        seed: Seed of the noise that a latent reward adds before it scores.
        sigmas: Noise levels in [0, 1] of a latent reward; rewards on pixels ignore them.
        batch_size: Most samples that are drawn at once; None draws all.
    """
    names = prompts.times(number)
    latents = torch.cat([sample(part) for part in names.split(batch_size)])
    return choose_best(reward, prompts, names, latents, seed, sigmas)


@torch.no_grad()
def choose_best(
    reward: Reward, prompts: PromptBatch, names: PromptBatch, latents: Tensor, seed: int, sigmas: Sequence[float]
) -> Chosen:
    """Keep the finished sample of each of B prompts that has the highest score, the first one of equals.

    All samples are scored in one call by :func:`~latentreward.alignment.score_finished`, with the same noise for those
    of a prompt, since some rewards compare them (``RewardMixture`` with ``normalise: group``). ``names`` are those of
    the ``latents`` ``(B·K, C, ...)``, K of each prompt in turn.
    """
    scores = score_finished(reward, latents, prompts, seed, sigmas).view(len(prompts), -1).cpu()
    rows = rows_of_choice(scores.argmax(dim=1, keepdim=True), scores.shape[1])
    return Chosen(latents[rows.to(latents.device)], names.select(rows.tolist()), scores.T)


@dataclass(frozen=True)
class Sampler:
    """A generator that is loaded, with the settings of its samples."""

    policy: Policy
    sampling: Sampling
    guidance_scale: float | None  # as :meth:`Family.guidance` returns it
    seed: int  # of all random numbers
    batch_size: int  # samples in one forward pass

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a function that samples latents."""
        return {"sampling": self.sampling, "guidance_scale": self.guidance_scale, "seed": self.seed}


@dataclass(frozen=True)
class Search:
    """How pictures are chosen by rewards; see the options of ``latentreward generate``."""

    reward: RewardSource | None
    best_of: int
    keep: Mapping[int, int]
    look_ahead: RewardSource | None
    step_search: Candidates | None
    reward_guidance: RewardGuidance | None
    sigmas: Sequence[float]

    def check(self, source: PolicySource, sampling: Sampling) -> None:
        """Raise InputError, before weights are loaded, if searches and rewards do not fit each other or a generator."""
        reward, guidance = self.reward, self.reward_guidance
        steps = {"keep": self.keep, "step_search": self.step_search, "reward_guidance": guidance}
        if len(given := [name for name, value in steps.items() if value]) > 1:
            raise InputError(f"{given[0]} and {given[1]} are both set; leave one out")
        if self.look_ahead is not None and not self.keep:
            raise InputError("look_ahead scores noisy states for keep alone; set keep, such as {0: 1}")
        if reward is None:
            if self.best_of > 1 or given:
                raise InputError("best_of, keep, step_search and reward_guidance need a reward; set reward")
            return
        if reward.remembers():
            raise InputError(
                "reward: a RewardMixture with normalise: running scores by all that it has seen, so a command that "
                "goes on would make other pictures; set normalise: group or none"
            )
        if guidance is not None and guidance.normalise:
            raise InputError(
                "reward_guidance.normalise divides by the norm over a batch, so pictures would depend on each other; "
                "leave it out"
            )
        reward.require_latents_of(source)
        sampler = sampling.sampler(source.resolve_family())
        Halving(self.best_of, self.keep).check(len(sampler))
        if self.keep:
            (self.look_ahead or reward).require_latents_of(source)
            check_states_reward("keep", self.look_ahead or reward)
        if self.step_search is not None:
            self.step_search.branching().steps(sampler)
        if guidance is not None:
            guidance.check(sampler)
            reward.require_guidance()

    def load(self, sampler: Sampler, prompt: str) -> tuple[list[Reward], Callable[[PromptBatch], Chosen]]:
        """Load the rewards, and return them and the function that samples one picture of each of B prompts.

        An unfit reward fails here, at random latents for ``prompt``.
        """
        policy, how, rows = sampler.policy, sampler.settings, sampler.batch_size
        device = next(policy.network.parameters()).device
        if self.keep:
            given = sampler.sampling, sampler.guidance_scale
            warn_of_another_policy(self.look_ahead or self.reward, policy, *given)  # type: ignore[arg-type]
        sources = [one for one in (self.reward, self.look_ahead) if one is not None]
        rewards = [one.load(policy).eval().to(device) for one in sources]
        for part in (part for one in rewards for part in one.modules() if isinstance(part, LatentScorer)):
            part.batch_size = part.batch_size or rows
        sample: Callable[[PromptBatch], Tensor] = partial(sample_latents, policy, **how)
        if not rewards:
            return [], lambda prompts: Chosen(sample(prompts), prompts)
        finished = min(self.keep.values(), default=self.best_of)
        shape = finished, *sampler.sampling.latent_shape(policy.family)
        noise, one = torch.randn(shape, generator=torch.Generator().manual_seed(0)), PromptBatch((prompt,), ("",))
        choose_best(rewards[0], one, one.times(finished), noise.to(device), 0, self.sigmas)
        if self.keep:
            return rewards, partial(self._halve, sampler, rewards)
        if self.step_search is not None:
            sample = partial(search_latents, policy, rewards[0], candidates=self.step_search, **how)
        elif self.reward_guidance is not None:
            sample = partial(sample_guided, policy, rewards[0], guidance=self.reward_guidance, **how)
        chosen = {"seed": sampler.seed, "sigmas": self.sigmas, "batch_size": rows}
        return rewards, lambda prompts: best_of_n(sample, rewards[0], prompts, self.best_of, **chosen)

    def _halve(self, sampler: Sampler, rewards: Sequence[Reward], prompts: PromptBatch) -> Chosen:
        halving, rows = Halving(self.best_of, self.keep), sampler.batch_size
        latents, left = halving.sample(sampler.policy, rewards[-1], prompts, **sampler.settings, batch_size=rows)
        names = prompts.times(self.best_of).select(left.tolist())
        return choose_best(rewards[0], prompts, names, latents, sampler.seed, self.sigmas)
