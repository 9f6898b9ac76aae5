"""Pruning: candidates are scored once, at a noisy state, and only some of them are sampled to the end.

:class:`FinishedSamples` is what the modules call: sampling, advantages, and what both cost.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from latentreward.alignment.rewards.base import RewardSource
from latentreward.alignment.rollout.advantages import Advantage
from latentreward.alignment.rollout.halving import check_states_reward, scored_cut
from latentreward.alignment.rollout.samplers import StepSampler
from latentreward.alignment.rollout.step_choice import wrong_indices
from latentreward.alignment.rollout.trajectories import (
    Kept,
    PromptedPolicy,
    RolloutDraws,
    Trajectories,
    sample_pruned,
)
from latentreward.core.contracts import PromptBatch, to_float64
from latentreward.core.errors import check_at_least_one, check_range
from latentreward.core.promises import Part, returns
from latentreward.core.running import pair_generator

if TYPE_CHECKING:
    from latentreward.alignment.modules.alignment import AlignmentModule

SMALLEST = torch.finfo(torch.float64).tiny
"""Least divisor, for predictions or rewards that are all equal: their correlation is then 0."""


class PruningRule(Part):
    """Rule that picks the candidates of one prompt that are sampled to the end."""

    @abstractmethod
    @returns(lambda found, rule, predicted, count, *given: wrong_indices(found, len(predicted), count), each=True)
    def choose(self, predicted: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return the indices of ``count`` candidates to keep, int64, by the rewards ``(N,)`` of their noisy states."""


class BestAndWorst(PruningRule):
    """Rule that keeps the ⌈K/2⌉ candidates with the highest and the ⌊K/2⌋ with the lowest prediction."""

    def choose(self, predicted: Tensor, count: int, generator: torch.Generator) -> Tensor:
        order, worst = predicted.argsort(stable=True), count // 2
        return torch.cat([order[:worst], order[len(order) - count + worst :]])


@dataclass
class Pruning:
    """Settings of pruned rollouts, for methods that learn from finished samples.

    Attributes:
        candidates: Number N of candidates of each prompt. The number K of samples of a prompt (``num_samples`` or
            ``num_trajectories``) of them are sampled to the end, scored and trained on. N = K prunes nothing and
            measures ρ.
        after_steps: Number of finished steps, from 1 on, after which the noisy states are scored, once.
        rule: Rule that picks the K candidates; None takes :class:`BestAndWorst`.
    """

    candidates: int
    after_steps: int
    rule: PruningRule | None = None

    def __post_init__(self) -> None:
        check_at_least_one("pruning.", candidates=self.candidates, after_steps=self.after_steps)

    def check(self, samples: str, count: int, steps: int, reward: RewardSource) -> None:
        """Raise InputError, before any weight is loaded, if the settings do not fit a module or its reward.

        ``samples`` is the name of the module's number of samples of a prompt, ``count`` that number K.
        """
        check_range(f"[{count}, inf)", f"{samples}={count} are finished", **{"pruning.candidates": self.candidates})
        check_range(f"[1, {steps - 1}]", "the last step leaves no noise", **{"pruning.after_steps": self.after_steps})
        check_states_reward("pruning", reward)


@dataclass(frozen=True)
class Agreement:
    r"""Agreement of predictions with the rewards of the kept samples, within prompts.

    Kept samples differ more than all candidates do, so their own correlation :math:`\rho_k` is too high. With M the
    variance of the kept predictions of a prompt over that of all its candidates' predictions, both without bias:

    .. math:: \rho^2 = \frac{\rho_k^2}{M - \rho_k^2 (M - 1)}, \qquad C = 1 + \rho^2 (M - 1),

    where C is the variance of the kept rewards of a prompt over that of all candidates' rewards. Both hold, for any
    rule, where rewards follow predictions along a line, with noise that does not depend on them.
    """

    # ``(6,)`` float64: squares of the kept predictions' deviations from their prompt's mean, squares of the rewards'
    # deviations, their products, squares of all candidates' deviations, and degrees of freedom of the kept and of all
    # candidates, K − 1 and N − 1 for each prompt.
    sums: Tensor

    @classmethod
    def of(cls, predicted: Tensor, kept: Tensor, rewards: Tensor) -> Self:
        """Compare predictions ``(P, N)`` with the ``rewards`` ``(P, K)`` of the ``kept``, indices ``(P, K)`` int64."""
        predicted, rewards = to_float64(predicted), to_float64(rewards)
        chosen = predicted.gather(1, kept.to(predicted.device))
        own, theirs, every = (one - one.mean(dim=1, keepdim=True) for one in (chosen, rewards, predicted))
        parts = own.square(), theirs.square(), own * theirs, every.square()
        free = (torch.ones_like(one[:, 1:]) for one in (own, every))
        return cls(torch.stack([part.sum() for part in (*parts, *free)]))

    @property
    def spread(self) -> Tensor:
        """Return M, at least 0; 1 if all candidates are kept."""
        own, every, kept_free, free = self.sums[[0, 3, 4, 5]]
        return own * free / (every * kept_free).clamp(min=SMALLEST)

    @property
    def correlation_kept(self) -> Tensor:
        """Return ρ_k, the correlation of the kept samples."""
        own, theirs, products = self.sums[:3]
        return products / (own * theirs).sqrt().clamp(min=SMALLEST)

    @property
    def correlation(self) -> Tensor:
        """Return ρ, the correlation of all candidates."""
        kept, spread = self.correlation_kept, self.spread
        return kept / (spread - kept**2 * (spread - 1)).clamp(min=SMALLEST).sqrt()

    @property
    def contrast(self) -> Tensor:
        """Return C, 1 for a ρ_k that chance explains.

        The square of a correlation is too high on average, by chance alone 1 / ν for ν degrees of freedom.
        """
        free, more = self.sums[4], self.spread - 1
        kept = ((self.correlation_kept**2 * free - 1) / (free - 1).clamp(min=1)).clamp(min=0)
        return 1 + kept / (1 + more - kept * more).clamp(min=SMALLEST) * more


def scaled_advantages(rule: Advantage, rewards: Tensor, contrast: Tensor | None) -> Tensor:
    """Compute advantages ``(P, K)`` of kept samples whose gradient is as large as that of samples without selection.

    C is ``contrast``, see :class:`Agreement`; None is exactly 1. The kept ``rewards`` ``(P, K)`` differ √C times as
    much as those of all candidates, and so does what advantages are multiplied with: deviations are divided by √C
    before the rule, and its advantages once more.
    """
    root: Tensor | float = 1.0
    device = rewards.device
    if contrast is not None:
        rewards, root = to_float64(rewards), contrast.sqrt()
        mean = rewards.mean(dim=1, keepdim=True)
        rewards = mean + (rewards - mean) / root
    groups = torch.arange(len(rewards), device=rewards.device).repeat_interleave(rewards.shape[1])
    return (rule(rewards.flatten(), groups).view_as(rewards) / root).to(device)


class FinishedSamples:
    """Samples of a module's rollout that are sampled to the end; with ``pruning`` ρ is measured in each, and logged."""

    def __init__(self, count: int, pruning: Pruning | None) -> None:
        self.count, self.pruning = count, pruning  # samples K of a prompt that are finished
        self.record: tuple[int, ...] = ()  # numbers of finished steps whose states are kept, for callbacks
        self.begin()

    def begin(self) -> None:
        """Begin a rollout."""
        self.samples = PromptBatch((), ())  # `count` rows of this rank for each prompt, with the candidates' own keys
        self.states: list[Tensor] = []  # of each batch ``(S, P·K, C, ...)``, those of ``record``, on the CPU
        self.rewards = torch.zeros(0, self.count)  # ``(P, K)`` of this rank, once the module has scored the samples
        self._batches: list[tuple[Tensor, Tensor]] = []

    def sample(
        self, module: AlignmentModule, prompts: PromptBatch, sampler: StepSampler, kept: Kept = "states"
    ) -> Trajectories:
        """Sample a batch of prompts, K samples of each to the end."""
        names = prompts.times(self.count if self.pruning is None else self.pruning.candidates)
        cuts = {}
        if self.pruning is not None:
            choose = partial(self._choose, module.seed, prompts, self.pruning)
            cuts[self.pruning.after_steps] = scored_cut(
                module.reward, module.reward.encode_prompts(prompts.prompts), prompts, choose
            )
        network = PromptedPolicy.of(module.policy, names, module.guidance_scale)
        draws = RolloutDraws(module.seed, names.keys)
        whole = "states" if self.record and kept == "finished" else kept
        taken, rows = sample_pruned(network, sampler, module.sampling, draws, cuts, whole)
        self.samples += names.select(rows.tolist())
        if self.record:
            self.states.append(taken.latents[[*self.record]].cpu())
        if whole != kept:
            taken = replace(taken, latents=taken.latents[-1:].clone())
        return taken

    def _choose(self, seed: int, prompts: PromptBatch, pruning: Pruning, predicted: Tensor) -> Tensor:
        """Choose K candidates of each prompt by ``predicted`` ``(P, N)``; keep the predictions and the choice."""
        rule = pruning.rule or BestAndWorst()
        drawn = [pair_generator(seed, "pruning", 0, key) for key in prompts.keys]
        choices = [rule.choose(one, self.count, own) for one, own in zip(predicted, drawn, strict=True)]
        self._batches.append((predicted, torch.stack(choices).sort(dim=1).values))
        return self._batches[-1][1]

    def advantages(
        self, module: AlignmentModule, rewards: Tensor, rule: Advantage, features: Tensor | None = None
    ) -> Tensor:
        """Compute the advantages ``(P, K)`` of this rank's ``samples`` from their rewards; leave values to log.

        All ranks call this at once; see :meth:`AlignmentModule.advantages` and :func:`scaled_advantages`.
        """
        if self.pruning is None:
            return module.advantages(rewards, rule, features)
        own = [*(torch.cat(parts).to(rewards.device) for parts in zip(*self._batches, strict=True)), rewards]
        predicted, kept, values = map(module.of_all_ranks, own)
        self.agreement = agreement = Agreement.of(predicted, kept, values)
        pruned = self.pruning.candidates > self.count  # else C is 1, but for rounding
        advantages = scaled_advantages(rule, values, agreement.contrast if pruned else None)
        module.rollout_values = {"prediction_correlation": agreement.correlation.item()}
        return module.of_this_rank(advantages, len(rewards))
