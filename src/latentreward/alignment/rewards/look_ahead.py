"""Rewards that look ahead: what they were trained to foresee, and how well they do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rewards.base import RewardSource
from latentreward.alignment.rewards.latent import LatentReward
from latentreward.alignment.rollout.samplers import Sampling
from latentreward.core.bootstrap import Interval, clustered_interval
from latentreward.core.storage.digests import digest
from latentreward.reward.scoring.find import name_of

RECORD = "look_ahead"
"""Key, in what a stored reward tells of its training, of what it was trained to foresee."""
logger = logging.getLogger(__name__)


def centred(values: Tensor) -> Tensor:
    """Subtract from ``values`` ``(P, K)`` the mean of each prompt."""
    return values - values.mean(dim=1, keepdim=True)


def within_prompts(predicted: Tensor, scores: Tensor) -> Interval:
    """Correlate predictions with the scores of the finished samples, both ``(P, K)``, within prompts.

    The 95 % interval resamples prompts.
    """
    first, second = centred(predicted.double().cpu()), centred(scores.double().cpu())
    products = torch.stack([first * second, first.square(), second.square()], dim=-1).sum(dim=1)

    def correlation(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2])

    return clustered_interval(products.numpy(), correlation)


def seen_by(policy: Policy, sampling: Sampling, guidance_scale: float | None) -> dict[str, Any]:
    """Describe a policy and its sampler, in plain values, as far as the states that they make depend on it."""
    at_work = [f".lora_B.{name}." for name in policy.adapters.working]
    trained = [weight for name, weight in policy.named_parameters() if any(part in name for part in at_work)]
    adapter = None
    if any(bool(weight.any()) for weight in trained):
        adapter = digest(weight.detach().cpu().float().contiguous().numpy().data for weight in trained)
    noise = sampling.noise_level if policy.family.flow else sampling.eta
    return {
        "policy": name_of(policy.source),
        "adapter": adapter,
        "num_inference_steps": sampling.num_inference_steps,
        "noise": noise or 0.0,
        "guidance_scale": guidance_scale,
        "latents": list(sampling.latent_shape(policy.family)),
    }


def warn_of_another_policy(
    reward: RewardSource, policy: Policy, sampling: Sampling, guidance_scale: float | None
) -> None:
    """Log one line if a reward looks ahead for another policy, sampler or guidance than these."""
    recipe = reward.stored.recipe if isinstance(reward, LatentReward) else None
    if recipe is not None:
        now = seen_by(policy, sampling, guidance_scale)
        warn_of_other_states(recipe.training.get(RECORD), now)


def warn_of_other_states(record: object, now: Mapping[str, Any]) -> None:
    """Log one line if what a reward was trained to foresee, its ``record``, differs from what it is to score ``now``.

    A reward without a record does not look ahead.
    """
    if not isinstance(record, Mapping):
        return
    if other := [name for name in now if record.get(name) != now[name]]:
        told = ", ".join(f"{name} {record.get(name)}, here {now[name]}" for name in other)
        logger.warning(
            "look_ahead was trained on other states (%s) and may foresee little; train it anew on these", told
        )
