"""Windows of steps with noise: the other steps of a rollout are deterministic and not trained on."""

from abc import abstractmethod

import torch
from torch import Tensor

from latentreward.alignment.rollout.samplers import StepSampler, Transition
from latentreward.core.errors import InputError, check_range
from latentreward.core.promises import Part, check_needs, returns, shown
from latentreward.diffusion.noise.processes import per_sample


def _wrong_start(found: int, window: "Window", steps: int, *given: object) -> str | None:
    if type(found) is int and 0 <= found <= steps - window.size:
        return None
    return f"{shown(found)}; it must be a whole number from 0 to {steps - window.size}, steps minus size"


class Window(Part):
    """Rule that chooses the steps with noise of one rollout, the same for all its trajectories.

    Attributes:
        size: Number of steps in a window.
    """

    needs = ("size",)
    size: int

    @abstractmethod
    @returns(_wrong_start, each=True)
    def start(self, steps: int, iteration: int, generator: torch.Generator) -> int:
        """Return the index of the window's first step, at most ``steps`` − ``size``.

        Args:
            steps: Number of steps that may be trained on.
            iteration: Optimiser steps done before this rollout.
            generator: Generator of the rollout.
        """

    def check(self, steps: int) -> None:
        """Raise InputError if the window is larger than the ``steps`` that may be trained on."""
        check_needs(self)
        if type(self.size) is not int or not 1 <= self.size <= steps:
            raise InputError(
                f"window.size={self.size!r} must lie between 1 and {steps}, the number of steps with noise between low "
                "and high; lower it, or raise sampling.num_inference_steps"
            )


class MovingWindow(Window):
    """Window that moves from the noisiest step to the last one as training goes on (after MixGRPO, arXiv:2507.21802).

    Each position serves ``every`` optimiser steps. The last position is that of the last full window.

    Args:
        size: Number of steps in the window; MixGRPO uses 4.
        every: Optimiser steps at one position; MixGRPO uses 25.
        stride: Steps by which the window moves; MixGRPO uses 1.
        restart: Whether training goes on at the first position after the last one; else it stays at the last.

    Raises:
        InputError: If a number is below 1.
    """

    def __init__(self, size: int = 4, every: int = 25, stride: int = 1, restart: bool = True) -> None:
        check_range("[1, inf)", size=size, every=every, stride=stride)
        self.size, self.every, self.stride, self.restart = size, every, stride, restart

    def start(self, steps: int, iteration: int, generator: torch.Generator) -> int:
        last = steps - self.size
        positions, position = -(-last // self.stride) + 1, iteration // self.every
        position = position % positions if self.restart else min(position, positions - 1)
        return min(position * self.stride, last)


class RandomWindow(Window):
    """Window at a random place in each rollout, as in Flow-GRPO-Fast.

    Args:
        size: Number of steps in the window; Flow-GRPO-Fast uses 2.

    Raises:
        InputError: If ``size`` is below 1.
    """

    def __init__(self, size: int = 2) -> None:
        check_range("[1, inf)", size=size)
        self.size = size

    def start(self, steps: int, iteration: int, generator: torch.Generator) -> int:
        return int(torch.randint(steps - self.size + 1, (1,), generator=generator))


class WindowedSampler(StepSampler):
    """Sampler with noise in some steps, and deterministic in the others.

    Args:
        noisy: Sampler of the steps with noise.
        plain: Sampler without noise, with the same timesteps.
        steps: Indices of the steps with noise.
    """

    def __init__(self, noisy: StepSampler, plain: StepSampler, steps: list[int]) -> None:
        self.noisy, self.plain = noisy, plain
        self.inside = torch.zeros(len(noisy), dtype=torch.bool)
        self.inside[steps] = True
        self.timesteps, self.noise_setting = noisy.timesteps, noisy.noise_setting
        self.noise_std = noisy.noise_std.where(self.inside, 0.0)

    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        # Both are computed, for rows may be at different steps; they are cheap beside the network.
        noisy, plain = (one.transition(latents, model_output, timesteps) for one in (self.noisy, self.plain))
        inside = self.inside[self.step_index(timesteps)].to(latents.device)
        return Transition(
            noisy.mean.where(per_sample(inside, noisy.mean), plain.mean),
            noisy.std.where(inside, 0.0),
            noisy.spread.where(inside, 0.0),
            noisy.density,
        )

    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        return self.noisy.clean(latents, model_output, timesteps)
