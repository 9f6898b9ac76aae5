"""Group-relative advantages (GRPO): rewards normalised within the samples of one state or prompt."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Literal, Self

import torch
from torch import Tensor

from latentreward.alignment.rollout.step_choice import rounded_down
from latentreward.core.contracts import to_float64
from latentreward.core.errors import InputError, check_choices, check_range
from latentreward.core.promises import Part, returns, tensor


class Advantage(Part):
    """Rule that turns the rewards of a rollout into advantages.

    Attributes:
        takes_parts: Whether the rule takes each reward of a mixture by itself, ``(N, R)``, in place of their sum.
        takes_features: Whether the rule is called with a third argument, features ``(N, F)`` of the samples.
    """

    takes_parts = False
    takes_features = False

    def check(self, rewards: int) -> None:
        """Raise InputError, before anything is loaded, if the rule does not fit a number of rewards."""
        if self.takes_parts and rewards < 2:
            name = type(self).__name__
            raise InputError(f"advantage: {name} normalises rewards one by one; take a RewardMixture of at least 2")

    def weighing(self, weights: Sequence[float]) -> Self:
        """Return the rule for rewards that a mixture weighs by ``weights``; itself if it takes their sum."""
        return self

    @abstractmethod
    @returns(
        tensor(lambda rule, rewards, *given: rewards.shape[:1] if rule.takes_parts else rewards.shape),
        each=True,
    )
    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Compute advantages, float32, of rewards ``(N,)`` or ``(N, T)`` of samples of the prompts ``groups`` (N,)."""


class GroupAdvantage(Advantage):
    """Advantage (reward − group's mean) / (standard deviation + ε), in float64.

    Groups of one sample, and of equal rewards, have the advantage 0. The columns of ``(N, T)`` rewards are independent.

    Args:
        std: Standard deviation that divides: of the ``group``, of ``all`` rewards of the rollout (Flow-GRPO,
            DiffusionNFT, AWM), or ``none``.
        ddof: 0 divides the sum of squares by n (Flow-GRPO), 1 by n − 1 (DanceGRPO, verl).
        epsilon: ε; 1e-4 in Flow-GRPO, 1e-8 in DanceGRPO.
        trim: Share in [0, ½) of a group's rewards that are left out of mean and standard deviation, on each side.
        clip: Bound of the advantages' absolute values; None sets no bound.
    """

    def __init__(
        self,
        std: Literal["group", "all", "none"] = "group",
        ddof: Literal[0, 1] = 0,
        epsilon: float = 1e-4,
        trim: float = 0.0,
        clip: float | None = None,
    ) -> None:
        check_choices(GroupAdvantage, std=std, ddof=ddof)
        check_range("(0, inf)", "Flow-GRPO uses 1e-4", epsilon=epsilon)
        check_range("[0, 0.5)", "0 uses all rewards", trim=trim)
        check_range("(0, inf)", "null sets no bound", clip=clip)
        self.std, self.ddof, self.epsilon, self.trim, self.clip = std, ddof, epsilon, trim, clip

    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        # In float64: rewards of a group may differ in the last digits of float32 alone.
        values = to_float64(rewards)
        groups, advantages = groups.to(values.device), torch.zeros_like(values)
        overall = self._spread(self._kept(values))
        for group in groups.unique():
            rows = groups == group
            kept = self._kept(values[rows])
            advantages[rows] = values[rows] - kept.mean(dim=0)
            if self.std != "none":
                advantages[rows] /= (overall if self.std == "all" else self._spread(kept)) + self.epsilon
        bounded = advantages if self.clip is None else advantages.clamp(-self.clip, self.clip)
        return bounded.float().to(rewards.device)

    def _kept(self, values: Tensor) -> Tensor:
        """Return a group's rewards without the least and the largest ones, sorted if any are left out."""
        cut = rounded_down(len(values) * self.trim)
        return values.sort(dim=0).values[cut : len(values) - cut] if cut else values

    def _spread(self, values: Tensor) -> Tensor:
        """Return the standard deviation; 1 for a single value, whose advantage is 0 anyway."""
        return values.std(dim=0, correction=self.ddof) if len(values) > 1 else torch.ones_like(values[0])


class GDPO(Advantage):
    """Advantage of several rewards (GDPO, arXiv:2601.05242): each is normalised in its group before they are added.

    The weighted sum of the group-relative advantages is then brought to mean 0 and standard deviation 1 over the
    rollout. A reward with a large spread does not drown the others, as it does in a sum of rewards. ``normalise`` of a
    :class:`~latentreward.alignment.RewardMixture` has no effect on advantages.

    Args:
        weights: Weight of each reward; None takes those of the mixture.
        epsilon: Least standard deviation that is divided by.
    """

    takes_parts = True

    def __init__(self, weights: Sequence[float] | None = None, epsilon: float = 1e-6) -> None:
        check_range("(0, inf)", epsilon=epsilon)
        if weights is not None and not (all(map(math.isfinite, weights)) and any(weights)):
            raise InputError(f"weights={list(weights)} must be finite, and one of them not 0")
        self.weights, self.epsilon = weights, epsilon

    def check(self, rewards: int) -> None:
        super().check(rewards)
        if self.weights is not None and len(self.weights) != rewards:
            raise InputError(f"advantage.weights={list(self.weights)} for {rewards} rewards; give one for each")

    def weighing(self, weights: Sequence[float]) -> Self:
        weighed = copy(self)
        weighed.weights = self.weights if self.weights is not None else list(weights)
        return weighed

    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Compute advantages ``(N,)`` of rewards ``(N, R)``; raise InputError if R is not the number of weights."""
        values = to_float64(rewards).reshape(len(rewards), -1)
        groups = groups.to(values.device)
        if self.weights is not None and len(self.weights) != values.shape[1]:
            raise InputError(f"GDPO: {values.shape[1]} rewards for {len(self.weights)} weights; give one for each")
        weights = values.new_tensor(self.weights or [1.0] * values.shape[1])
        total = values.new_zeros(len(values))
        for group in groups.unique():
            rows = groups == group
            total[rows] = self._standardised(values[rows]) @ weights
        return self._standardised(total).float().to(rewards.device)

    def _standardised(self, values: Tensor) -> Tensor:
        std, mean = torch.std_mean(values, dim=0, correction=0)
        return (values - mean) / std.clamp(min=self.epsilon)


class DiversityAdvantage(Advantage):
    r"""Advantage of GARDO (arXiv:2512.24138): good samples count the more, the less they resemble their group.

    .. math:: A_i = (r_i - \bar r)\, m_i, \qquad m_i = 1 \text{ if } r_i < \bar r, \text{ else } \delta_i / \bar\delta

    with :math:`\delta_i` the least cosine distance of a sample's features to those of another sample of its group, and
    bars the means over the group. Not divided by a standard deviation. GARDO takes features of pixels (DINOv3); the
    modules give the finished latents, averaged over areas, which needs no decoding (ours).
    """

    takes_features = True

    def __call__(self, rewards: Tensor, groups: Tensor, features: Tensor | None = None) -> Tensor:
        """See :meth:`Advantage.__call__`; ``features`` are ``(N, F)``; raise ValueError without them."""
        if features is None:
            raise ValueError("DiversityAdvantage needs features")
        values = to_float64(rewards)
        groups, advantages = groups.to(values.device), torch.zeros_like(values)
        directions = torch.nn.functional.normalize(to_float64(features), dim=1)
        for group in groups.unique():
            rows = (groups == group).nonzero().flatten()
            if len(rows) < 2:
                continue
            distance = 1 - directions[rows] @ directions[rows].T
            nearest = distance.fill_diagonal_(math.inf).min(dim=1).values.clamp(min=0)
            mean = nearest.mean()
            # Equal samples have no diversity to divide by: all count the same.
            share = nearest / mean if mean > 0 else torch.ones_like(nearest)
            gain = values[rows] - values[rows].mean(dim=0)
            advantages[rows] = torch.where(gain < 0, gain, gain * share.view(-1, *[1] * (gain.ndim - 1)))
        return advantages.float().to(rewards.device)


def group_advantages(scores: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Compute advantages (score − mean) / (std + ε) among K candidates of B states: ``(K, B)``, float32."""
    values = to_float64(scores)
    std, mean = torch.std_mean(values, dim=0, correction=0)
    return ((values - mean) / (std + epsilon)).float().to(scores.device)
