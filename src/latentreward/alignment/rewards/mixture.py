"""Weighted sum of several rewards, each normalised first so that weights do not depend on the rewards' scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from latentreward.alignment.rewards.base import Reward, RewardSource
from latentreward.core.contracts import LatentSpace, NoisyStates
from latentreward.core.errors import InputError

if TYPE_CHECKING:
    from latentreward.alignment.policies.loading import PolicySource
    from latentreward.alignment.policies.policy import Policy

Normalise = Literal["group", "running", "none"]
SMALLEST_STD = 1e-4  # constant added to a standard deviation before dividing, as in the advantages of Flow-GRPO


class RewardMixture(RewardSource):
    """A weighted sum of rewards.

    Args:
        rewards: Rewards to add, at least one.
        weights: One weight per reward, applied after normalisation; a negative weight makes a penalty. None gives each
            of n rewards the weight 1 / n.
        normalise: ``group`` shifts and scales each reward's scores to mean 0 and standard deviation 1 over the states
            of a prompt in one call, that is, over the candidates to compare; a prompt with a single state is refused.
            ``running`` uses mean and standard deviation of all scores that a reward has given so far on this process;
            checkpoints hold the values of rank 0. ``none`` adds the raw scores. No gradient flows into means and
            standard deviations. Where they are 1, a threshold of pair selection must be tuned anew.

    Example:
        .. code-block:: yaml

            reward:
              class_path: RewardMixture
              init_args:
                rewards:
                  - {class_path: LatentReward, init_args: {path: runs/lrm/reward.ckpt}}
                  - {class_path: CallableReward, init_args: {function: my_rewards.saturation}}
                weights: [1.0, 0.2]
    """

    def __init__(
        self, rewards: Sequence[RewardSource], weights: Sequence[float] | None = None, normalise: Normalise = "group"
    ) -> None:
        weights = [1 / max(len(rewards), 1)] * len(rewards) if weights is None else list(weights)
        if not rewards or len(weights) != len(rewards) or not any(weights) or not all(map(math.isfinite, weights)):
            told = f"reward mixture: weights={weights} for {len(rewards)} rewards"
            raise InputError(f"{told}; give at least one reward, and a finite weight for each, one of them not 0")
        self.rewards, self.weights, self.normalise = list(rewards), weights, normalise

    @property
    def part_weights(self) -> Sequence[float]:  # type: ignore[override]  # no attribute: recorded settings hold those
        """Weights of the rewards."""
        return self.weights

    def latent_space(self) -> LatentSpace | None:
        spaces = {space for reward in self.rewards if (space := reward.latent_space()) is not None}
        if len(spaces) > 1:
            told = "; ".join(sorted(map(str, spaces)))
            raise InputError(f"the rewards of a mixture take latents of different spaces ({told}); mix those of one")
        return next(iter(spaces), None)

    def scores_states(self) -> bool:
        return all(reward.scores_states() for reward in self.rewards)

    def has_gradient(self) -> bool:
        return all(reward.has_gradient() for reward in self.rewards)

    def remembers(self) -> bool:
        return self.normalise == "running" or any(reward.remembers() for reward in self.rewards)

    def judges_alone(self) -> bool:
        return self.normalise != "group" and all(reward.judges_alone() for reward in self.rewards)

    def require_latents_of(self, policy: PolicySource) -> None:
        for reward in self.rewards:
            reward.require_latents_of(policy)

    def load(self, policy: Policy) -> MixedReward:
        return MixedReward([reward.load(policy) for reward in self.rewards], self.weights, self.normalise)


class MixedReward(Reward):
    """A loaded :class:`RewardMixture`, of loaded rewards."""

    seen: Tensor
    """Count, sum and sum of squares of each reward's scores so far: ``(rewards, 3)`` float64; only for ``running``."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float], normalise: Normalise) -> None:
        super().__init__()
        self.rewards, self.weights, self.normalise = nn.ModuleList(rewards), tuple(weights), normalise
        self.needs_clean = any(reward.needs_clean for reward in rewards)
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.changes_buffers = normalise == "running"
        self.answers_later = any(reward.answers_later for reward in rewards)
        self._sums, self._count = torch.zeros(len(rewards), dtype=torch.float64), 0
        if self.changes_buffers:
            self.register_buffer("seen", torch.zeros(len(rewards), 3, dtype=torch.float64))

    def set_precision(self, dtype: torch.dtype) -> None:
        for reward in self.rewards:
            reward.set_precision(dtype)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for reward in self.rewards:
            reward.check_prompts(prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Any, ...]:
        return tuple(reward.encode_prompts(prompts) for reward in self.rewards)

    def score(self, states: NoisyStates, encoded: tuple[Any, ...]) -> Tensor:
        parts = [reward(states, known) for reward, known in zip(self.rewards, encoded, strict=True)]
        return self.mix(torch.stack(parts, dim=1), states.rows)

    def score_clean(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Tensor:
        return self.mix(self.begin_parts(latents, rows, encoded, noise, sigmas)(), rows)

    def begin_parts(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Callable[[], Tensor]:
        """See :meth:`Reward.begin_parts`; rewards that answer later are asked first."""
        order = sorted(range(len(self.rewards)), key=lambda number: not self.rewards[number].answers_later)
        given = {number: (latents, rows, encoded[number], noise, sigmas) for number in order}
        begun = {number: self.rewards[number].begin_parts(*given[number]) for number in order}
        return lambda: torch.stack([one.mix(begun[place](), rows) for place, one in enumerate(self.rewards)], dim=1)

    def mix(self, parts: Tensor, rows: Tensor) -> Tensor:
        """See :meth:`Reward.mix`; under ``running`` the parts count as seen."""
        rows = rows.to(parts.device)
        self._sums += parts.detach().cpu().double().sum(dim=0)
        self._count += len(parts)
        columns = list(parts.unbind(dim=1))
        if self.normalise == "group":
            columns = [standardise(scores, rows) for scores in columns]
        elif self.normalise == "running":
            # By mean and standard deviation of all scores of a reward so far, including these.
            for index, scores in enumerate(columns):
                seen = self.seen[index]
                values = scores.detach().to(seen)
                seen += torch.stack([values.new_tensor(len(values)), values.sum(), (values**2).sum()])
                count, total, squares = seen.tolist()
                mean = total / count
                std = max(squares / count - mean**2, 0.0) ** 0.5
                columns[index] = (scores - mean) / (std + SMALLEST_STD)
        return torch.stack([weight * part for weight, part in zip(self.weights, columns, strict=True)]).sum(dim=0)

    def mix_apart(self, parts: Tensor, spread: Tensor) -> Tensor:
        scales = torch.ones_like(spread) if self.normalise == "none" else spread + SMALLEST_STD
        return (parts / scales) @ parts.new_tensor(self.weights)

    def take_means(self) -> Tensor | None:
        means = self._sums / self._count if self._count else None
        self._sums, self._count = torch.zeros_like(self._sums), 0
        return means


def standardise(scores: Tensor, groups: Tensor) -> Tensor:
    """Shift and scale scores ``(N,)`` to mean 0 and standard deviation 1 in each of ``groups`` ``(N,)``, int64.

    No gradient flows into means and standard deviations.
    """
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    if sizes.min() < 2:
        told = "normalise: group compares the states of a prompt, but got a single one"
        raise InputError(f"reward mixture: {told}; draw several candidates, or set normalise: running")

    def mean(values: Tensor) -> Tensor:
        return (values.new_zeros(len(sizes)).index_add(0, group, values) / sizes)[group]

    average = mean(scores.detach())
    std = mean((scores.detach() - average) ** 2).sqrt()
    return (scores - average) / (std + SMALLEST_STD)
