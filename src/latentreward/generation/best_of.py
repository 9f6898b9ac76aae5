"""Best-of-N sampling: sample N images per prompt, and keep the one with the highest reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentreward.contracts import PromptBatch
from latentreward.rewards import Reward
from latentreward.rollout import score_finished


@dataclass(frozen=True)
class BestOf:
    """Result of best-of-N sampling for B prompts.

    Attributes:
        latents: ``(B, C, ...)`` finished latents of the best sample of each prompt.
        scores: ``(N, B)`` scores of all samples, on the CPU.
        index: ``(B,)`` number of the best sample, 0 to N - 1, on the CPU.
    """

    latents: Tensor
    scores: Tensor
    index: Tensor


@torch.no_grad()
def best_of_n(
    sample: Callable[[PromptBatch], Tensor],
    reward: Reward,
    prompts: PromptBatch,
    number: int,
    *,
    seed: int = 0,
    sigmas: Sequence[float] = (),
) -> BestOf:
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
            :func:`~latentreward.rollout.score_finished`; all samples of a prompt get the same noise.
        sigmas: Noise levels in [0, 1] of a latent reward; rewards on pixels ignore them.
    """
    samples = [sample(PromptBatch(prompts.prompts, tuple(f"{key}/{n}" for key in prompts.keys))) for n in range(number)]
    by_prompt = torch.stack(samples, dim=1)
    scores = score_finished(reward, by_prompt.flatten(0, 1), prompts, seed, sigmas).view(len(prompts), number)
    index = scores.argmax(dim=1)
    rows = torch.arange(len(prompts), device=by_prompt.device)
    return BestOf(by_prompt[rows, index.to(by_prompt.device)], scores.T.cpu(), index.cpu())
