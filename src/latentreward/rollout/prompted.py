"""Policy with a rollout's encoded prompts, for use at all steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentreward.contracts import Conditioning, PromptBatch
from latentreward.policies import Policy


@dataclass(frozen=True)
class PromptedPolicy:
    """Guided network of a policy for B prompts, which are encoded once.

    Attributes:
        policy: The generator.
        conditioning: Encoded prompts, B rows.
        uncond: Encoded empty prompt, one row; None without guidance.
        guidance_scale: Scale as checked by :meth:`Family.guidance`; None for networks without guidance.
    """

    policy: Policy
    conditioning: Conditioning
    uncond: Conditioning | None
    guidance_scale: float | None

    @classmethod
    def of(cls, policy: Policy, prompts: PromptBatch, guidance_scale: float | None) -> PromptedPolicy:
        """Encode the prompts, and the empty prompt if the guidance needs it."""
        uncond = policy.encode_uncond() if policy.family.needs_uncond(guidance_scale) else None
        return cls(policy, policy.encode_prompts(prompts.prompts), uncond, guidance_scale)

    def select(self, rows: Tensor) -> PromptedPolicy:
        """Return the network for the prompts of ``rows`` ``(N,)`` int64, in any number and order."""
        return replace(self, conditioning=self.conditioning.select(rows))

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return next(self.policy.network.parameters()).device

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Predict for ``latents`` ``(N, C, ...)``, all at one timestep; N is a multiple of B, prompts innermost."""
        prompts = len(self.conditioning)
        repeats = len(latents) // prompts
        conditioning = self.conditioning if repeats == 1 else self.conditioning.select([*range(prompts)] * repeats)
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        return self.policy.predict_guided(latents, timesteps, conditioning, self.uncond, self.guidance_scale)
