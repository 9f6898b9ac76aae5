"""Rollouts that score several candidates for the next state, step by step, and selection of training pairs of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rewards.base import Reward, score_states
from latentreward.alignment.rollout.samplers import Sampling, StepSampler
from latentreward.alignment.rollout.trajectories import PromptedPolicy, RolloutDraws
from latentreward.core.contracts import PromptBatch, StepPairs
from latentreward.core.errors import check_choices, check_range
from latentreward.core.promises import Kind, Part, number, of_class, returns, tensor, wrong_tensor
from latentreward.reward import gather_with_grad


@dataclass
class Branching:
    """Settings for the candidates of a rollout: their number, the timesteps that have them, and how to go on.

    Attributes:
        num_candidates: Number K of candidates for the next state.
        low: Lowest timestep of the steps that sample and score candidates; other steps sample one state.
        high: Highest timestep of the steps that sample and score candidates; above 1000 for schedulers that have more.
        continue_from: Candidate with which the rollout goes on: a ``random`` one, the ``best`` or the ``worst``.
        score_at: Timestep that the reward gets: that of the state before the ``step`` (LPO), or the ``candidate``'s own
            (SPO).
    """

    num_candidates: int = 4
    low: float = 0.0
    high: float = 1000.0
    continue_from: Literal["random", "best", "worst"] = "random"
    score_at: Literal["step", "candidate"] = "step"

    def __post_init__(self) -> None:
        check_choices(Branching, continue_from=self.continue_from, score_at=self.score_at)
        check_range("[2, inf)", "one leaves nothing to compare", num_candidates=self.num_candidates)
        check_range(f"[-inf, {self.high}]", "exchange low and high", low=self.low)

    def steps(self, sampler: StepSampler) -> list[int]:
        """Return the indices of the steps with noise in the window [low, high]; raise InputError if there is none."""
        return sampler.noisy_steps(self.low, self.high)

    def training_steps(self, sampler: StepSampler) -> list[int]:
        """Return :meth:`steps` for a method that trains on them; raise InputError if there are fewer than two."""
        return sampler.noisy_steps(self.low, self.high, least=2)


@dataclass(frozen=True)
class CandidateStep:
    """Step of a rollout with K scored candidates for each of B prompts."""

    index: int  # Index of the step
    timestep: float  # Timestep of the states before the step
    latents: Tensor  # ``(B, C, ...)`` states x_t before the step, float32
    candidates: Tensor  # ``(K, B, C, ...)`` candidates for the next state, float32
    scores: Tensor  # ``(K, B)`` the candidates' rewards, float32
    log_prob: Tensor  # ``(K, B)`` log-probabilities under the policy that sampled the candidates, float32


def candidate_steps(
    policy: Policy,
    sampler: StepSampler,
    reward: Reward,
    prompts: PromptBatch,
    branching: Branching,
    sampling: Sampling,
    guidance_scale: float | None,
    draws: RolloutDraws,
) -> Generator[CandidateStep, None, Tensor]:
    """Sample from noise to the finished latents ``(B, C, ...)``, with K scored candidates at each step of the window.

    Yields a :class:`CandidateStep` for each of these. A reward with ``needs_clean`` also gets the policy's x̂_0 of each
    candidate; candidates of the last step are clean already. The caller sets ``policy.eval()`` and autocast.
    ``guidance_scale`` is as checked by :meth:`Family.guidance`.
    """
    window = branching.steps(sampler)
    policy.edit_at(sampling.height, sampling.width)
    with torch.no_grad():
        network, encoded = PromptedPolicy.of(policy, prompts, guidance_scale), reward.encode_prompts(prompts.prompts)
    shape, rows = sampling.latent_shape(policy.family), torch.arange(len(prompts))
    latents = draws.initial(shape).to(network.device)
    output: Tensor | None = None
    for index, timestep in sampler.steps():
        with torch.no_grad():  # left before each yield, so that the caller's gradient mode is unchanged
            if output is None:
                output = network(latents, timestep)
            # One Gaussian for all K candidates: the network is evaluated at the state before the step alone.
            transition = sampler.transition(latents, output, torch.full((len(prompts),), timestep))
            if index not in window:
                latents, output = transition.sample(draws.noise(index, 1, shape)[0]), None
                continue
            candidates = transition.sample(draws.noise(index, branching.num_candidates, shape))
            # SPO's reward reads pictures, so the network is also evaluated at each candidate.
            clean, outputs = _finished(network, sampler, candidates, index) if reward.needs_clean else (None, None)
            # LPO scores at the timestep of the state before, as released; SPO at that of the candidate.
            scored_at = timestep if branching.score_at == "step" else sampler.next_timestep(index)
            flat, repeated = candidates.flatten(0, 1), rows.repeat(branching.num_candidates)  # prompts innermost
            scores = score_states(reward, encoded, flat, repeated, scored_at, clean).view(-1, len(prompts))
            log_prob = transition.log_prob(candidates)
        yield CandidateStep(index, timestep, latents, candidates, scores, log_prob)
        if branching.continue_from == "random":
            choice = draws.choice(index, branching.num_candidates)
        else:
            choice = (scores.argmax(dim=0) if branching.continue_from == "best" else scores.argmin(dim=0)).cpu()
        latents = candidates[choice, rows]
        # The pass that predicted x̂_0 of this candidate is the next step's: SPO would otherwise pay it twice.
        output = None if outputs is None else outputs[choice, rows]
    return latents


def _finished(
    network: PromptedPolicy, sampler: StepSampler, candidates: Tensor, index: int
) -> tuple[Tensor, Tensor | None]:
    """Predict the candidates' clean latents ``(K·B, C, ...)``; also return the output ``(K, B, C, ...)`` for reuse."""
    flat = candidates.flatten(0, 1)
    if index + 1 == len(sampler):
        return flat, None
    timestep = sampler.next_timestep(index)
    output = network(flat, timestep)
    return sampler.clean(flat, output, torch.full((len(flat),), timestep)), output.view_as(candidates)


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


def _wrong_pairs(found: SelectedPairs, rule: PairSelection, step: CandidateStep, sampler: StepSampler) -> str | None:
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
