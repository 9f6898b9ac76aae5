"""Scores of finished latents, and of noisy states at their own noise level."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.rewards.base import Reward
from latentreward.core.contracts import NoisyStates, PromptBatch
from latentreward.core.errors import InputError
from latentreward.core.running import phase
from latentreward.core.seeding import pair_generator


def check_sigmas(sigmas: Sequence[float], field: str = "reward_sigmas") -> None:
    """Raise InputError, which names ``field``, if there are no noise levels, or one is outside [0, 1] or repeated."""
    if not sigmas or len(set(sigmas)) < len(sigmas) or not all(0.0 <= sigma <= 1.0 for sigma in sigmas):
        raise InputError(f"{field}={list(sigmas)} must be at least one noise level in [0, 1], each once")


@phase("reward")
def score_states(
    reward: Reward, encoded: Any, latents: Tensor, rows: Tensor, timestep: float, clean: Tensor | None = None
) -> Tensor:
    """Score states that are all at one timestep: ``(N,)``, float32.

    States are ``(N, C, ...)`` at ``timestep`` of the policy; ``rows`` ``(N,)`` are the indices of their prompts in
    ``encoded``; rewards with ``needs_clean`` get the predicted ``clean`` latents.

    Raises:
        InputError: If a score has the wrong shape or is not finite.
    """
    timesteps = torch.full((len(latents),), timestep, device=latents.device)
    scores: Tensor = reward(NoisyStates(latents, timesteps, rows.to(latents.device), clean), encoded)
    return scores


@phase("reward")
def score_finished(reward: Reward, latents: Tensor, prompts: PromptBatch, seed: int, sigmas: Sequence[float]) -> Tensor:
    """Score finished latents: ``(N,)``, float32.

    A reward that scores noisy latents adds noise at the levels ``sigmas``. All samples of a prompt share that noise,
    so that their scores differ only because of the samples. Latents are ``(N, C, ...)``, first the N / P samples of
    the first of P prompts. ``seed`` is that of the noise.
    """
    return reward.score_clean(*_scoring_inputs(reward, latents, prompts, seed), sigmas).float()


@phase("reward")
def begin_finished(
    reward: Reward, latents: Tensor, prompts: PromptBatch, seed: int, sigmas: Sequence[float]
) -> Callable[[], Tensor]:
    """Begin to score finished latents by each reward of a mixture; see :func:`score_finished`.

    Returns:
        Function that waits for the scores ``(N, R)``, float32; see :meth:`Reward.begin_parts`.
    """
    begun = reward.begin_parts(*_scoring_inputs(reward, latents, prompts, seed), sigmas)
    return phase("reward")(lambda: begun().float())


def _scoring_inputs(
    reward: Reward, latents: Tensor, prompts: PromptBatch, seed: int
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Return latents, rows, encoded prompts and noise, as :meth:`Reward.score_clean` takes them."""
    # One noise for all samples of a prompt: it cancels in their comparison.
    generators = [pair_generator(seed, "reward noise", 0, key) for key in prompts.keys]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    rows = rows_of(prompts, latents)
    with torch.no_grad():
        encoded = reward.encode_prompts(prompts.prompts)
    return latents, rows, encoded, noise.to(latents.device)[rows]


def rows_of(prompts: PromptBatch, latents: Tensor) -> Tensor:
    """Return the index of the prompt of each of ``latents`` ``(N, C, ...)``, of which each prompt has N / P in turn."""
    return torch.arange(len(prompts)).repeat_interleave(len(latents) // len(prompts)).to(latents.device)
