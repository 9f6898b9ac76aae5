"""Choice of a rollout's steps: those that are trained on, and the window of those with noise."""

from abc import abstractmethod

import torch
from torch import Tensor

from latentreward.alignment.rollout.samplers import StepSampler, Transition
from latentreward.core.errors import InputError, check_range
from latentreward.core.promises import Part, has_values, returns, shown, wrong_tensor
from latentreward.diffusion.noise.processes import per_sample


def wrong_indices(found: Tensor, below: int, count: int = -1) -> str | None:
    """Return what is wrong with distinct indices below a number: one or more, or ``count`` of them."""
    if problem := wrong_tensor(found, (count,), "indices", 0, below - 1):
        return problem
    if not has_values(found) or 0 < len(found) == len(found.unique()):  # an estimate builds modules without values
        return None
    return f"{found.tolist()}; it must be {'one or more' if count < 0 else count}, each once"


class StepChoice(Part):
    """Rule that picks steps of a sampler for one finished sample."""

    @abstractmethod
    @returns(lambda found, rule, steps, *given: wrong_indices(found, steps), each=True)
    def choose(self, steps: int, generator: torch.Generator) -> Tensor:
        """Return the indices of distinct steps among ``steps``, int64."""


class RandomSteps(StepChoice):
    """Random choice of nearly all steps, as in DiffusionNFT (arXiv:2509.16117).

    Args:
        share: Share of the sampler's steps, in (0, 1], rounded down; DiffusionNFT trains on 99 %: 9 of 10.
    """

    def __init__(self, share: float = 0.99) -> None:
        check_range("(0, 1]", "DiffusionNFT uses 0.99", share=share)
        self.share = share

    def choose(self, steps: int, generator: torch.Generator) -> Tensor:
        if not (count := rounded_down(steps * self.share)):
            raise InputError(f"share={self.share:g} of {steps} steps leaves none; raise it, or num_inference_steps")
        return torch.randperm(steps, generator=generator)[:count]


class NoisiestSteps(StepChoice):
    """Random choice of some of the first steps, which are the noisiest, as in DGPO (arXiv:2510.08425).

    Args:
        count: Number of steps, at least 1; DGPO uses 4.
        share: Share of the sampler's steps, in (0, 1], rounded, from which they are chosen; DGPO uses 0.7: 7 of 10.
    """

    def __init__(self, count: int = 4, share: float = 0.7) -> None:
        check_range("[1, inf)", "DGPO uses 4", count=count)
        check_range("(0, 1]", "DGPO uses 0.7", share=share)
        self.count, self.share = count, share

    def choose(self, steps: int, generator: torch.Generator) -> Tensor:
        first = round(steps * self.share)
        check_range(f"[1, {first}]", f"these may be chosen of {steps} steps", count=self.count)
        return torch.randperm(first, generator=generator)[: self.count]


class StratifiedSteps(StepChoice):
    """Choice of one step in each of several ranges of equal length, as in AWM (arXiv:2509.25050).

    Args:
        count: Number of steps, at least 1; AWM uses 6.
        first: First step that may be chosen; AWM leaves out step 0, where the latents are noise alone.
        share: Share of the sampler's steps, in (0, 1], rounded down, before which the last chosen step lies; AWM uses
            0.9.
    """

    def __init__(self, count: int = 6, first: int = 1, share: float = 0.9) -> None:
        check_range("[1, inf)", "AWM uses 6", count=count)
        check_range("[0, inf)", "AWM uses 1", first=first)
        check_range("(0, 1]", "AWM uses 0.9", share=share)
        self.count, self.first, self.share = count, first, share

    def choose(self, steps: int, generator: torch.Generator) -> Tensor:
        last = rounded_down(steps * self.share)
        check_range(f"[1, {last - self.first}]", f"these may be chosen of {steps} steps", count=self.count)
        device = generator.device  # also where a module is built under another default device
        edges = torch.linspace(self.first, last, self.count + 1, dtype=torch.float64, device=device).long()
        shares = torch.rand(self.count, generator=generator, dtype=torch.float64, device=device)
        return edges[:-1] + (shares * edges.diff()).long()


def rounded_down(number: float) -> int:
    """Round down; a product such as 100 · 0.29, which floats make 28.999…, counts as the 29 that is meant."""
    return int(number + 1e-9)


def _wrong_start(found: int, window: "Window", steps: int, *given: object) -> str | None:
    if type(found) is int and 0 <= found <= steps - window.size:
        return None
    return f"{shown(found)}; it must be a whole number from 0 to {steps - window.size}, steps minus size"


class Window(Part):
    """Rule that chooses the steps with noise of one rollout, the same for all its trajectories."""

    size: int  # number of steps in a window

    @abstractmethod
    @returns(_wrong_start, each=True)
    def start(self, steps: int, iteration: int, generator: torch.Generator) -> int:
        """Return the index of the window's first step, at most ``steps`` − ``size``.

        ``steps`` may be trained on; ``iteration`` is the number of optimiser steps done before this rollout.
        """

    def check(self, steps: int) -> None:
        """Raise InputError if the window is larger than the ``steps`` that may be trained on."""
        check_range(f"[1, {steps}]", "these have noise between low and high", **{"window.size": self.size})


class MovingWindow(Window):
    """Window that moves from the noisiest step to the last one as training goes on (after MixGRPO, arXiv:2507.21802).

    Args:
        size: Number of steps in the window; MixGRPO uses 4.
        every: Optimiser steps at one position; MixGRPO uses 25.
        stride: Steps by which the window moves; MixGRPO uses 1.
        restart: Whether training goes on at the first position after that of the last full window, or stays there.
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
    """Window of ``size`` steps at a random place in each rollout, as in Flow-GRPO-Fast."""

    def __init__(self, size: int = 2) -> None:
        check_range("[1, inf)", size=size)
        self.size = size

    def start(self, steps: int, iteration: int, generator: torch.Generator) -> int:
        return int(torch.randint(steps - self.size + 1, (1,), generator=generator))


class WindowedSampler(StepSampler):
    """Sampler with noise in some steps, of given indices; the others are those of ``plain``, at the same timesteps."""

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
