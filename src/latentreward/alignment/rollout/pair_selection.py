"""Selection of training pairs among the candidates of a step."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentreward.alignment.rollout.candidates import CandidateStep
from latentreward.alignment.rollout.samplers import StepSampler
from latentreward.core.contracts import PromptBatch, StepPairs
from latentreward.core.errors import check_range
from latentreward.core.promises import Kind, Part, number, of_class, returns, tensor, wrong_tensor
from latentreward.reward import gather_with_grad

SHARES = ("[0, 1]", "as gaps tanh(Δ/2) and shares of them do")


@dataclass(frozen=True)
class SelectedPairs:
    """Best and worst candidate of each prompt at one step."""

    winner: Tensor  # ``(B,)`` int64: index of the candidate with the highest score
    loser: Tensor  # ``(B,)`` int64: index of the candidate with the lowest score
    # ``(B,)`` float32 in [0, 1]: difference of the softmax probabilities of the two scores, which is tanh(Δ/2) for
    # a score difference Δ
    gap: Tensor
    kept: Tensor  # ``(B,)`` bool: whether the pair is trained on


def _wrong_pairs(found: SelectedPairs, rule: "PairSelection", step: CandidateStep, sampler: StepSampler) -> str | None:
    if problem := of_class(SelectedPairs)(found):
        return problem
    count, prompts = step.scores.shape
    kinds: dict[str, Kind] = {"winner": "indices", "loser": "indices", "gap": "numbers", "kept": "bool"}
    for name, kind in kinds.items():
        high = {"indices": count - 1, "numbers": 1}.get(kind, math.inf)
        if problem := wrong_tensor(getattr(found, name), (prompts,), kind, 0, high):
            return f"{name} as {problem}"
    return None


class PairSelection(Part):
    """Base class of rules that pair the best with the worst candidate, and keep pairs with a large score gap."""

    @returns(_wrong_pairs)
    def select(self, step: CandidateStep, sampler: StepSampler) -> SelectedPairs:
        """Select the pairs of one step; every rank must call this at the same steps, with equally many prompts."""
        best, worst = step.scores.float().max(dim=0), step.scores.float().min(dim=0)
        # The released code computes this as a difference of two softmax probabilities; it is tanh(Δ/2).
        gap = ((best.values - worst.values) / 2).tanh()
        return SelectedPairs(best.indices, worst.indices, gap, self.keep(gap, step.index, sampler))

    @abstractmethod
    @returns(tensor(lambda rule, gap, *given: gap.shape, "bool"), each=True)
    def keep(self, gap: Tensor, index: int, sampler: StepSampler) -> Tensor:
        """Tell which of the gaps ``(B,)`` at step ``index`` are large enough to keep: ``(B,)`` bool."""


class ThresholdSelection(PairSelection):
    """Base class of rules that keep gaps above a threshold, which depends only on the step."""

    def keep(self, gap: Tensor, index: int, sampler: StepSampler) -> Tensor:
        return gap > self.threshold(index, sampler)

    @abstractmethod
    @returns(number(int | float, "a number from 0 to 1", high=1), each=True)
    def threshold(self, index: int, sampler: StepSampler) -> float:
        """Return the threshold of step ``index``, in [0, 1]."""


class FixedThreshold(ThresholdSelection):
    """Rule that keeps gaps tanh(Δ/2) above one ``threshold`` in [0, 1] at all steps (SPO, arXiv:2406.04314)."""

    def __init__(self, threshold: float) -> None:
        check_range(*SHARES, threshold=threshold)
        self._threshold = threshold

    def threshold(self, index: int, sampler: StepSampler) -> float:
        return self._threshold


class ScheduledThreshold(ThresholdSelection):
    """Base class of rules whose threshold is linear in a quantity of the step, see :meth:`quantity`.

    Args:
        low: Threshold of the gap tanh(Δ/2), in [0, 1], at the step with noise that has the lowest quantity.
        high: Threshold at the step with the highest one.
    """

    def __init__(self, low: float, high: float) -> None:
        check_range(*SHARES, high=high)
        self._low, self._high = low, high
        check_range(f"[0, {high}]", "the threshold at less noise is the lower one", low=low)

    def threshold(self, index: int, sampler: StepSampler) -> float:
        values = self.quantity(sampler)
        # Steps without noise have no pairs; their quantity must not stretch the scale.
        seen = values[sampler.noise_std > 0]
        extent = (seen.max() - seen.min()).item()
        fraction = (values[index] - seen.min()).item() / extent if extent else 0.0
        return self._low + fraction * (self._high - self._low)

    @abstractmethod
    @returns(tensor(lambda rule, sampler: (len(sampler),)))
    def quantity(self, sampler: StepSampler) -> Tensor:
        """Return the quantity of each step in which the threshold is linear, ``(T,)``."""


class SigmaThreshold(ScheduledThreshold):
    """Rule with a threshold linear in the standard deviation of a step's noise (LPO, arXiv:2502.01051).

    LPO uses 0.35 to 0.5 for SD1.5 and 0.45 to 0.6 for SDXL.
    """

    def quantity(self, sampler: StepSampler) -> Tensor:
        return sampler.noise_std


class VarianceThreshold(ScheduledThreshold):
    """Rule with a threshold linear in the variance of a step's noise (an option of LPO's code)."""

    def quantity(self, sampler: StepSampler) -> Tensor:
        return sampler.noise_std**2


class LinearThreshold(ScheduledThreshold):
    """Rule with a threshold linear in the timestep (an option of LPO's code)."""

    def quantity(self, sampler: StepSampler) -> Tensor:
        return sampler.timesteps


class QuantileThreshold(PairSelection):
    """Rule that keeps the pairs whose gap reaches a quantile of all ranks' gaps at the same step of the rollout.

    At every timestep the share 1 − ``quantile`` of pairs is kept, whatever the scale of the reward; 0 keeps all pairs
    of different scores. Pairs of equal scores are never kept.
    """

    def __init__(self, quantile: float = 0.5) -> None:
        check_range(*SHARES, quantile=quantile)
        self._quantile = quantile

    def keep(self, gap: Tensor, index: int, sampler: StepSampler) -> Tensor:
        # Over all ranks: a rank with few prompts would have a quantile of its own.
        return (gap >= gather_with_grad(gap).quantile(self._quantile)) & (gap > 0)


def step_pairs(step: CandidateStep, selected: SelectedPairs, prompts: PromptBatch) -> StepPairs:
    """Make a training record of the kept pairs of a step, on the CPU; the record may have no rows."""
    rows = selected.kept.nonzero().flatten()
    chosen, rejected = (step.candidates[side[rows], rows] for side in (selected.winner, selected.loser))
    index = rows.tolist()
    timesteps = torch.full((len(index),), step.timestep)
    texts = tuple(prompts.prompts[i] for i in index)
    keys = tuple(f"{prompts.keys[i]}/{step.index}" for i in index)
    return StepPairs(keys, texts, step.latents[rows], timesteps, chosen, rejected, selected.gap[rows]).to("cpu")


def gap_quantiles(gaps: Iterable[tuple[float, Tensor]], levels: tuple[float, ...] = (0.1, 0.5, 0.9)) -> str:
    """Summarise quantiles of score gaps in one line; ``gaps`` are pairs of a timestep and its gaps ``(n,)``."""
    by_timestep: dict[float, list[Tensor]] = {}
    for timestep, values in gaps:
        by_timestep.setdefault(timestep, []).append(values.detach().float().cpu())
    seen = sorted(by_timestep, reverse=True)
    if not seen:
        return "no score gaps seen"
    if not any(values.any() for every in by_timestep.values() for values in every):
        return "all scores of a group are equal; take a reward that tells samples apart"
    # Of many timesteps a message shows five, spread evenly.
    indices = torch.linspace(0, len(seen) - 1, min(len(seen), 5)).round().long().tolist()
    parts = []
    for timestep in (seen[index] for index in indices):
        quantiles = torch.cat(by_timestep[timestep]).quantile(torch.tensor(levels))
        parts.append(f"t={timestep:g}: " + "/".join(f"{value:.3g}" for value in quantiles.tolist()))
    return f"score gaps ({'/'.join(f'{100 * level:g}' for level in levels)} % quantiles) " + ", ".join(parts)
