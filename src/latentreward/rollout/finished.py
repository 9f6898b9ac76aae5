"""Scores of what sampling gave in the end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentreward.contracts import PromptBatch
from latentreward.errors import InputError
from latentreward.rewards.base import Reward
from latentreward.seeding import pair_generator


def check_sigmas(reward_sigmas: Sequence[float]) -> None:
    """Raise InputError for noise levels at which no reward can score."""
    if not reward_sigmas or not all(0.0 <= sigma <= 1.0 for sigma in reward_sigmas):
        raise InputError(f"reward_sigmas={list(reward_sigmas)} must be at least one noise level in [0, 1]")


def score_finished(reward: Reward, latents: Tensor, prompts: PromptBatch, seed: int, sigmas: Sequence[float]) -> Tensor:
    """Scores ``(N,)``, float32, of finished latents.

    A reward that scores noisy latents noises them at levels ``sigmas``, with noise that all samples of a prompt share,
    so that they differ by themselves alone.

    Args:
        reward: The judge.
        latents: ``(N, C, ...)``, N / P in succession for each of P prompts.
        prompts: P prompts.
        seed: Seed of the noise.
        sigmas: Noise levels of a reward on latents; without effect on one of pixels.
    """
    generators = [pair_generator(seed, "reward noise", 0, key) for key in prompts.keys]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    rows = torch.arange(len(prompts)).repeat_interleave(len(latents) // len(prompts)).to(latents.device)
    with torch.no_grad():
        encoded = reward.encode_prompts(prompts.prompts)
    return reward.score_clean(latents, rows, encoded, noise.to(latents.device)[rows], sigmas).float()
