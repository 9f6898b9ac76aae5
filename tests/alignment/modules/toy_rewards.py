"""Rewards that are formulas, with a gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment import Policy, Reward, RewardSource
from latentreward.core.contracts import LatentSpace, NoisyStates


class Brightness(Reward):
    """−mean((x − (prompt length / 10))²) of the latents, smoothed by what noise is added at each level."""

    differentiable = True

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([len(prompt) / 10 for prompt in prompts])

    def score(self, states: NoisyStates, encoded: Any) -> Tensor:
        wanted = encoded[states.rows.to(encoded.device)].to(states.latents.device)
        return -(states.latents.flatten(1) - wanted[:, None]).square().mean(dim=1)

    def score_clean(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Tensor:
        noisy = [(1 - sigma) * latents + sigma * noise for sigma in sigmas] or [latents]
        timesteps = torch.zeros(len(latents))
        return torch.stack([self(NoisyStates(level, timesteps, rows), encoded) for level in noisy]).mean(dim=0)


class BrightnessSource(RewardSource):
    """Of any space, or of the one given."""

    def __init__(self, space: LatentSpace | None = None, differentiable: bool = True) -> None:
        self.space, self.differentiable = space, differentiable

    def latent_space(self) -> LatentSpace | None:
        return self.space

    def load(self, policy: Policy) -> Reward:
        reward = Brightness()
        reward.differentiable = self.differentiable
        return reward
