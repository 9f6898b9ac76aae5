"""Rewards without a trained model: your own function, and random controls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from latentreward.contracts import NoisyStates
from latentreward.errors import InputError
from latentreward.rewards.base import Reward, RewardSource
from latentreward.seeding import pair_generator
from latentreward.storage.digests import digest

if TYPE_CHECKING:
    from latentreward.policies import Policy

READOUT_CHANNELS = 32


class CallableReward(RewardSource):
    """Any function of latents as a reward.

    Args:
        function: Called as ``function(latents, timesteps, prompts)`` with ``(N, C, ...)``, ``(N,)`` and N raw prompts,
            and with ``clean=`` ``(N, C, ...)`` too under ``needs_clean``; returns scores ``(N,)``, higher is better.
        needs_clean: Whether it looks at the policy's prediction of the finished latents.
        differentiable: Whether its scores carry a gradient to the latents (or to ``clean``), for ReFL.

    Example:
        .. code-block:: yaml

            reward: {class_path: CallableReward, init_args: {function: my_rewards.saturation}}
    """

    def __init__(self, function: Callable[..., Any], needs_clean: bool = False, differentiable: bool = False) -> None:
        self.function, self.needs_clean, self.differentiable = function, needs_clean, differentiable

    def latent_space(self) -> None:
        """Any: what the function makes of latents is its own affair."""

    def load(self, policy: Policy) -> FunctionReward:
        """See :meth:`RewardSource.load`."""
        return FunctionReward(self.function, self.needs_clean, self.differentiable)


class FunctionReward(Reward):
    """See :class:`CallableReward`."""

    def __init__(self, function: Callable[..., Tensor], needs_clean: bool, differentiable: bool) -> None:
        super().__init__()
        self.function, self.needs_clean, self.differentiable = function, needs_clean, differentiable

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """The prompts as they are."""
        return tuple(prompts)

    def score(self, states: NoisyStates, encoded: tuple[str, ...]) -> Tensor:
        """See :meth:`Reward.score`."""
        prompts = [encoded[row] for row in states.rows.tolist()]
        clean = {"clean": states.clean} if self.needs_clean else {}
        return self.function(states.latents, states.timesteps, prompts, **clean)


class RandomReward(RewardSource):
    """A control that knows nothing of prompts or pictures: what alignment gains by it is not the reward's doing.

    Args:
        kind: ``noise`` gives every state a number of its own, N(0, ``scale``²), so that there is nothing to learn;
            ``readout`` is a fixed random function of the latents (a random convolution, a non-linearity and a random
            mean), differentiable, with standard deviation ``scale`` over states of pure noise, so that there is
            something to learn, but nothing good.
        seed: Seed of the numbers or of the function.
        scale: Spread of the scores; candidates of one state differ as much under ``noise``, and less under ``readout``.

    Raises:
        InputError: If ``scale`` is not positive.
    """

    def __init__(self, kind: Literal["noise", "readout"] = "noise", seed: int = 0, scale: float = 1.0) -> None:
        if not scale > 0:
            raise InputError(f"reward.scale={scale:g} must be above 0")
        self.kind, self.seed, self.scale = kind, seed, scale

    def latent_space(self) -> None:
        """Any."""

    def load(self, policy: Policy) -> FunctionReward:
        """See :meth:`RewardSource.load`."""
        if self.kind == "noise":
            return FunctionReward(self._number, needs_clean=False, differentiable=False)
        return FunctionReward(self._readout(policy.latent_space.channels), needs_clean=False, differentiable=True)

    def _number(self, latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        numbers = []
        for state, timestep, prompt in zip(latents.detach().float().cpu(), timesteps.tolist(), prompts, strict=True):
            content = digest([state.contiguous().numpy()], 64)
            generator = pair_generator(self.seed, "random reward", 0, json.dumps([prompt, timestep]), content)
            numbers.append(torch.randn((), generator=generator))
        return self.scale * torch.stack(numbers).to(latents.device)

    def _readout(self, channels: int) -> Callable[..., Tensor]:
        generator = pair_generator(self.seed, "random readout", 0, "")
        weight = torch.randn(READOUT_CHANNELS, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        bias, mix = torch.randn(2, READOUT_CHANNELS, generator=generator)

        def read(latents: Tensor) -> Tensor:
            with torch.autocast(latents.device.type, enabled=False):
                maps = torch.tanh(F.conv2d(latents.float(), weight.to(latents.device), bias.to(latents.device)))
                return maps.mean(dim=(2, 3)) @ mix.to(latents.device)

        spread = read(torch.randn(256, channels, 8, 8, generator=generator)).std()
        return lambda latents, timesteps, prompts: read(latents) * (self.scale / spread.item())
