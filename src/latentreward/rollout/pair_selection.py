"""Which of a step's candidates become a pair to learn from."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentreward.contracts import PromptBatch, StepPairs
from latentreward.errors import InputError
from latentreward.losses.gather import gather_with_grad
from latentreward.rollout.base import StepSampler
from latentreward.rollout.candidates import CandidateStep

SHOWN_TIMESTEPS = 5
"""Timesteps that a message shows, spread over those seen."""


@dataclass(frozen=True)
class SelectedPairs:
    """The best and the worst candidate of each prompt.

    Attributes:
        winner: ``(B,)`` int64, the candidate with the greatest score.
        loser: ``(B,)`` int64, the one with the least.
        gap: ``(B,)`` float32 in [0, 1]: softmax of the two scores, first minus second, which is tanh(Δ/2).
        kept: ``(B,)`` bool.
    """

    winner: Tensor
    loser: Tensor
    gap: Tensor
    kept: Tensor


class PairSelection(ABC):
    """Pairs the best candidate with the worst, and keeps the pair if their scores lie far enough apart."""

    def select(self, step: CandidateStep, sampler: StepSampler) -> SelectedPairs:
        """Pairs of one step; every rank calls it at the same steps with equally many prompts."""
        best, worst = step.scores.float().max(dim=0), step.scores.float().min(dim=0)
        gap = ((best.values - worst.values) / 2).tanh()
        return SelectedPairs(best.indices, worst.indices, gap, self.keep(gap, step.index, sampler))

    @abstractmethod
    def keep(self, gap: Tensor, index: int, sampler: StepSampler) -> Tensor:
        """Which of the gaps ``(B,)`` at step ``index`` are great enough: ``(B,)`` bool."""


class ThresholdSelection(PairSelection):
    """Keeps gaps above a threshold that depends on the step alone."""

    def keep(self, gap: Tensor, index: int, sampler: StepSampler) -> Tensor:
        """See :meth:`PairSelection.keep`."""
        return gap > self.threshold(index, sampler)

    @abstractmethod
    def threshold(self, index: int, sampler: StepSampler) -> float:
        """Threshold of step ``index``."""


class FixedThreshold(ThresholdSelection):
    """One threshold for all steps (SPO, arXiv:2406.04314).

    Args:
        threshold: In [0, 1].

    Raises:
        InputError: If it lies outside.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = _share("threshold", threshold)

    def threshold(self, index: int, sampler: StepSampler) -> float:
        """See :meth:`ThresholdSelection.threshold`."""
        return self._threshold


class ScheduledThreshold(ThresholdSelection):
    """From ``low`` at the step where a quantity is least to ``high`` where it is greatest, linear in that quantity.

    Deterministic steps do not count.

    Args:
        low: Threshold of the step with the least, in [0, 1].
        high: Threshold of the step with the greatest, in [0, 1].

    Raises:
        InputError: If one lies outside, or ``low`` above ``high``.
    """

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = _share("low", low), _share("high", high)
        if low > high:
            raise InputError(f"low={low:g} lies above high={high:g}; exchange them: noisier steps take the higher one")

    def threshold(self, index: int, sampler: StepSampler) -> float:
        """See :meth:`ThresholdSelection.threshold`."""
        values = self.quantity(sampler)
        seen = values[sampler.noise_std > 0]
        extent = (seen.max() - seen.min()).item()
        fraction = (values[index] - seen.min()).item() / extent if extent else 0.0
        return self._low + fraction * (self._high - self._low)

    @abstractmethod
    def quantity(self, sampler: StepSampler) -> Tensor:
        """What the threshold follows, ``(T,)``."""


class SigmaThreshold(ScheduledThreshold):
    """Linear in the standard deviation of a step's noise (LPO, arXiv:2502.01051: SD1.5 .35 to .5, SDXL .45 to .6)."""

    def quantity(self, sampler: StepSampler) -> Tensor:
        """See :meth:`ScheduledThreshold.quantity`."""
        return sampler.noise_std


class VarianceThreshold(ScheduledThreshold):
    """Linear in the variance of a step's noise (an option of LPO's code)."""

    def quantity(self, sampler: StepSampler) -> Tensor:
        """See :meth:`ScheduledThreshold.quantity`."""
        return sampler.noise_std**2


class LinearThreshold(ScheduledThreshold):
    """Linear in the timestep (an option of LPO's code)."""

    def quantity(self, sampler: StepSampler) -> Tensor:
        """See :meth:`ScheduledThreshold.quantity`."""
        return sampler.timesteps


class QuantileThreshold(PairSelection):
    """Keeps, at each step, the pairs whose gap reaches a quantile of the gaps that all ranks have at that step now.

    A reward of any scale keeps the same share, 1 − ``quantile``, at every timestep. Nothing is remembered from one
    rollout to the next, so a run resumes as it would have gone on; the more prompts a rollout has, the steadier the
    quantile. Pairs without a gap are never kept.

    Args:
        quantile: In [0, 1]; 0 keeps all.

    Raises:
        InputError: If it lies outside.
    """

    def __init__(self, quantile: float = 0.5) -> None:
        self._quantile = _share("quantile", quantile)

    def keep(self, gap: Tensor, index: int, sampler: StepSampler) -> Tensor:
        """See :meth:`PairSelection.keep`."""
        return (gap >= gather_with_grad(gap).quantile(self._quantile)) & (gap > 0)


def step_pairs(step: CandidateStep, selected: SelectedPairs, prompts: PromptBatch) -> StepPairs:
    """The kept pairs of a step, on the CPU; possibly none."""
    rows = selected.kept.nonzero().flatten()
    chosen, rejected = (step.candidates[side[rows], rows] for side in (selected.winner, selected.loser))
    index = rows.tolist()
    timesteps = torch.full((len(index),), step.timestep)
    texts = tuple(prompts.prompts[i] for i in index)
    keys = tuple(f"{prompts.keys[i]}/{step.index}" for i in index)
    return StepPairs(keys, texts, step.latents[rows], timesteps, chosen, rejected, selected.gap[rows]).to("cpu")


def gap_quantiles(gaps: Iterable[tuple[float, Tensor]], levels: tuple[float, ...] = (0.1, 0.5, 0.9)) -> str:
    """One line with quantiles of score gaps at some of the timesteps, for messages.

    Args:
        gaps: Timestep and gaps ``(n,)`` of any number of rollout steps.
        levels: Quantiles to show.
    """
    by_timestep: dict[float, list[Tensor]] = {}
    for timestep, values in gaps:
        by_timestep.setdefault(timestep, []).append(values.detach().float().cpu())
    seen = sorted(by_timestep, reverse=True)
    if not seen:
        return "no score gaps seen"
    places = torch.linspace(0, len(seen) - 1, min(len(seen), SHOWN_TIMESTEPS)).round().long().tolist()
    parts = []
    for timestep in (seen[place] for place in places):
        quantiles = torch.cat(by_timestep[timestep]).quantile(torch.tensor(levels))
        parts.append(f"t={timestep:g}: " + "/".join(f"{value:.3g}" for value in quantiles.tolist()))
    return f"score gaps ({'/'.join(f'{100 * level:g}' for level in levels)} % quantiles) " + ", ".join(parts)


def _share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{name}={value:g} must lie in [0, 1], as gaps tanh(Δ/2) and shares of them do")
    return value
