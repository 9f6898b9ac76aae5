"""What a rollout makes of its prompts: random numbers, and the policy with the prompts encoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from latentreward.alignment.policies.policy import Policy
from latentreward.core.contracts import Conditioning, PromptBatch
from latentreward.core.errors import InputError, quoted
from latentreward.core.seeding import pair_generator


class RolloutDraws:
    """Random numbers that depend only on seed, a prompt's key and step, not on batch, rank or device.

    Args:
        seed: Seed of the run.
        keys: Keys of the B prompts; equal keys give equal numbers.
    """

    def __init__(self, seed: int, keys: Sequence[str]) -> None:
        self._seed, self._keys = seed, tuple(keys)

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal initial latents ``(B, *shape)``, float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators("rollout start")])

    def noise(self, index: int, count: int, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal noise ``(count, B, *shape)`` for step ``index``, float32 on the CPU."""
        generators = self._generators("rollout noise", index)
        return torch.stack([torch.randn((count, *shape), generator=g) for g in generators], dim=1)

    def choice(self, index: int, count: int) -> Tensor:
        """Draw the index of one of ``count`` candidates per prompt after step ``index``: ``(B,)`` int64 on the CPU."""
        return torch.cat([torch.randint(count, (1,), generator=g) for g in self._generators("rollout choice", index)])

    def resampled(self, index: int, weights: Sequence[Tensor]) -> list[Tensor]:
        """Draw with replacement, in proportion to n weights, n indices per prompt after step ``index``.

        ``weights`` has ``(n,)`` on the CPU for each of the B prompts; n may differ.

        Returns:
            int64 indices ``(n,)`` for each prompt.
        """
        drawn = zip(weights, self._generators("rollout resampling", index), strict=True)
        return [torch.multinomial(part, len(part), replacement=True, generator=g) for part, g in drawn]

    def _generators(self, purpose: str, index: int = 0) -> list[torch.Generator]:
        # By key, never by place in a batch: a rollout is equal on any number of ranks, and after a resume.
        return [pair_generator(self._seed, purpose, 0, key, f"step {index}") for key in self._keys]


@dataclass(frozen=True)
class PriorNoise:
    """Noise that a sample was drawn from, by what draws it again; its text is kept with the finished picture.

    Attributes:
        seed: Seed of the draw.
        key: Key of the prompt, which no other sample of the run has.
        shape: Shape ``(C, ...)`` of the latents.
    """

    seed: int
    key: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.seed} {self.key} {'x'.join(map(str, self.shape))}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of a noise; raise InputError if it is none."""
        if (found := re.fullmatch(r"(-?\d{1,20}) (\S+) (\d{1,9}(?:x\d{1,9})+)", text)) is None:
            raise InputError(
                f"{quoted(text)} names no noise; give the column noise of the table of latentreward generate"
            )
        return cls(int(found[1]), found[2], tuple(map(int, found[3].split("x"))))

    def draw(self) -> Tensor:
        """Draw the noise ``(C, ...)`` again, float32 on the CPU, as rollouts draw it."""
        return RolloutDraws(self.seed, [self.key]).initial(self.shape)[0]


@dataclass(frozen=True)
class PromptedPolicy:
    """Guided network of a policy for B prompts, which are encoded once.

    Attributes:
        policy: The generator.
        conditioning: Encoded prompts, B rows.
        uncond: Encoded empty prompt, one row, or B where it depends on a row's sources; None without guidance.
        guidance_scale: Scale as checked by :meth:`Family.guidance`; None for networks without guidance.
    """

    policy: Policy
    conditioning: Conditioning
    uncond: Conditioning | None
    guidance_scale: float | None
    _packed: dict[int, Conditioning] = field(default_factory=dict, init=False, repr=False)  # number of rows → prompts

    @classmethod
    def of(cls, policy: Policy, prompts: PromptBatch, guidance_scale: float | None) -> PromptedPolicy:
        """Encode the prompts, and the empty prompt if the guidance needs it."""
        uncond = policy.encode_uncond(prompts.prompts) if policy.family.needs_uncond(guidance_scale) else None
        return cls(policy, policy.encode_prompts(prompts.prompts), uncond, guidance_scale)

    def select(self, rows: Tensor) -> PromptedPolicy:
        """Return the network for the prompts of ``rows`` ``(N,)`` int64, in any number and order."""
        return replace(self, conditioning=self.conditioning.select(rows), uncond=self._uncond(rows))

    def _uncond(self, rows: Tensor | list[int]) -> Conditioning | None:
        """Return the empty prompt for the given rows; it is one row for all unless it depends on a row's sources."""
        return self.uncond and self.uncond.empty_for(rows)

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return next(self.policy.network.parameters()).device

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Predict for ``latents`` ``(N, C, ...)``, all at one timestep; N is a multiple of B, prompts innermost."""
        count, prompts = len(latents), len(self.conditioning)
        if count not in self._packed:  # text of many tokens: copied once, not at each timestep
            rows = [*range(prompts)] * (count // prompts)
            every = self.conditioning if count == prompts else self.conditioning.select(rows)
            self._packed[count] = self.policy.with_uncond(every, self._uncond(rows), self.guidance_scale)
        timesteps = torch.full((count,), timestep, device=latents.device)
        return self.policy.predict_packed(latents, timesteps, self._packed[count], self.guidance_scale)
