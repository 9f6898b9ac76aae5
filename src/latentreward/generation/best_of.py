"""Best of N: whole samples, of which the one with the highest score is kept."""

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
    """What was kept of N samples per prompt.

    Attributes:
        latents: ``(B, C, ...)`` the best, finished.
        scores: ``(N, B)`` of all samples, on the CPU.
        index: ``(B,)`` number of the best, on the CPU.
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

    The n-th samples are drawn under the keys ``KEY/n``, so that the first N of a larger search are the samples of a
    smaller one. All samples of a prompt are scored in one call, as rewards that compare them ask for.

    Args:
        sample: Finished latents ``(B, C, ...)`` of B prompts, e.g. ``partial(sample_latents, policy, ...)``.
        reward: Scores finished latents.
        prompts: B prompts.
        number: N, at least 1; 1 gives the samples with their scores.
        seed: See :func:`~latentreward.rollout.score_finished`; the noise is the same for all samples of a prompt.
        sigmas: Likewise.
    """
    samples = [sample(PromptBatch(prompts.prompts, tuple(f"{key}/{n}" for key in prompts.keys))) for n in range(number)]
    by_prompt = torch.stack(samples, dim=1)
    scores = score_finished(reward, by_prompt.flatten(0, 1), prompts, seed, sigmas).view(len(prompts), number)
    index = scores.argmax(dim=1)
    rows = torch.arange(len(prompts), device=by_prompt.device)
    return BestOf(by_prompt[rows, index.to(by_prompt.device)], scores.T.cpu(), index.cpu())
