"""Choice of the sampler's noise levels at which a finished sample is trained on."""

from abc import abstractmethod

import torch
from torch import Tensor

from latentreward.core.errors import InputError, check_range
from latentreward.core.promises import Part, returns, wrong_tensor


def _wrong_choice(found: Tensor, rule: "StepChoice", steps: int, generator: torch.Generator) -> str | None:
    if problem := wrong_tensor(found, (-1,), "indices", 0, steps - 1):
        return problem
    if found.is_meta or 0 < len(found) == len(found.unique()):  # an estimate builds modules without values
        return None
    return f"steps {found.tolist()}; it must be one or more, each once"


class StepChoice(Part):
    """Rule that picks steps of a sampler for one finished sample."""

    @abstractmethod
    @returns(_wrong_choice, each=True)
    def choose(self, steps: int, generator: torch.Generator) -> Tensor:
        """Return the indices of distinct steps among ``steps``, int64.

        Raises:
            InputError: If the sampler has too few steps.
        """


class RandomSteps(StepChoice):
    """Random choice of nearly all steps, as in DiffusionNFT (arXiv:2509.16117).

    Args:
        share: Share of the sampler's steps, in (0, 1], rounded down; DiffusionNFT trains on 99 %: 9 of 10.

    Raises:
        InputError: If ``share`` is out of range.
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

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(self, count: int = 4, share: float = 0.7) -> None:
        check_range("[1, inf)", "DGPO uses 4", count=count)
        check_range("(0, 1]", "DGPO uses 0.7", share=share)
        self.count, self.share = count, share

    def choose(self, steps: int, generator: torch.Generator) -> Tensor:
        if (first := round(steps * self.share)) < self.count:
            raise InputError(
                f"count={self.count}: only the first {first} of {steps} steps may be chosen; lower count, or raise "
                "share or num_inference_steps"
            )
        return torch.randperm(first, generator=generator)[: self.count]


class StratifiedSteps(StepChoice):
    """Choice of one step in each of several ranges of equal length, as in AWM (arXiv:2509.25050).

    Args:
        count: Number of steps, at least 1; AWM uses 6.
        first: First step that may be chosen; AWM leaves out step 0, where the latents are noise alone.
        share: Share of the sampler's steps, in (0, 1], rounded down, before which the last chosen step lies; AWM uses
            0.9.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(self, count: int = 6, first: int = 1, share: float = 0.9) -> None:
        check_range("[1, inf)", "AWM uses 6", count=count)
        check_range("[0, inf)", "AWM uses 1", first=first)
        check_range("(0, 1]", "AWM uses 0.9", share=share)
        self.count, self.first, self.share = count, first, share

    def choose(self, steps: int, generator: torch.Generator) -> Tensor:
        last = rounded_down(steps * self.share)
        if last - self.first < self.count:
            raise InputError(
                f"count={self.count}: of {steps} steps only those from {self.first} to {last - 1} may be chosen; lower "
                "count, or raise num_inference_steps"
            )
        device = generator.device  # also where a module is built under another default device
        edges = torch.linspace(self.first, last, self.count + 1, dtype=torch.float64, device=device).long()
        shares = torch.rand(self.count, generator=generator, dtype=torch.float64, device=device)
        return edges[:-1] + (shares * edges.diff()).long()


def rounded_down(number: float) -> int:
    """Round down; a product such as 100 · 0.29, which floats make 28.999…, counts as the 29 that is meant."""
    return int(number + 1e-9)
