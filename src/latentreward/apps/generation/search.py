"""Searches with a reward in our own sampling loop: the best of N samples, and of K states at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentreward.alignment import (
    Branching,
    Policy,
    Reward,
    RolloutDraws,
    Sampling,
    candidate_steps,
    score_finished,
)
from latentreward.core.contracts import PromptBatch


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
    all samples of a search with a smaller one. All samples are scored in one call by
    :func:`~latentreward.alignment.score_finished`, with the same noise for those of a prompt, since some rewards
    compare them (``RewardMixture`` with ``normalise: group``).

    Args:
        sample: Function that samples finished latents ``(B, C, ...)`` for B prompts, e.g.
            ``partial(sample_latents, policy, ...)``.
        reward: Reward for finished latents.
        prompts: B prompts.
        number: Samples N per prompt, at least 1.
        seed: Seed of the noise that a latent reward adds before it scores.
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
