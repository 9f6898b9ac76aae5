"""What a sample or a step earns: rewards normalised within a prompt or state (GRPO), and credit of single steps."""

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
        """Compute advantages ``(N,)`` of rewards ``(N, R)``."""
        values = to_float64(rewards).reshape(len(rewards), -1)
        groups = groups.to(values.device)
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


class Credit(Part):
    """Rule that turns the rewards of a trajectory's states into one reward for each step."""

    @abstractmethod
    @returns(tensor(lambda rule, rewards: rewards[:, 1:].shape), each=True)
    def __call__(self, rewards: Tensor) -> Tensor:
        """Compute the steps' rewards ``(N, S)``, float64, from those of the states before and after ``(N, S + 1)``."""

    @returns(tensor(lambda rule, rewards, steps: (len(rewards), len(steps))), each=True)
    def of_steps(self, rewards: Tensor, steps: Sequence[int]) -> Tensor:
        """Compute the rewards ``(N, len(steps))`` of the steps that are trained on, of all S steps."""
        return self(rewards)[:, list(steps)]


class GainCredit(Credit):
    r"""Credit of a step: the discounted sum of the gains from this step on.

    .. math:: \sum_{j \ge k} \gamma^{j - k} g_j, \qquad g_j = r_{j+1} - r_j

    γ = 0 gives a step its own gain, as Stepwise-Flow-GRPO (arXiv:2603.28718) and DenseGRPO (arXiv:2601.20218) describe
    it; γ = 1 gives the gain from the state before the step to the end.

    Args:
        gamma: γ in [0, 1]. On the tiny world 1 fell behind plain GRPO (docs/methods/step_credit.md).
    """

    def __init__(self, gamma: float = 0.0) -> None:
        check_range("[0, 1]", "0 is the step's own gain, 1 the gain to the end", gamma=gamma)
        self.gamma = gamma

    def __call__(self, rewards: Tensor) -> Tensor:
        credit = to_float64(rewards).diff(dim=1)
        # Backwards, so that each step adds the discounted sum of those after it.
        for step in range(credit.shape[1] - 2, -1, -1):
            credit[:, step] += self.gamma * credit[:, step + 1]
        return credit


class StateCredit(Credit):
    """Credit of a step: the reward of the state before it, as in Euphonium's process advantage (arXiv:2602.04928)."""

    def __call__(self, rewards: Tensor) -> Tensor:
        return to_float64(rewards[:, :-1])


class TurningPointCredit(Credit):
    r"""Credit of TP-GRPO (arXiv:2602.06422): a main reward, and a bonus at steps where a trajectory turns to its goal.

    With the gains :math:`g_k = r_k - r_{k-1}`, k = 1 … S, and the total gain :math:`G = r_S - r_0`, step k > 1 is a
    turning point if :math:`g_{k-1} G < 0 < g_k G`, and the first step if :math:`g_1 G > 0`.

    Args:
        main: Main reward of every step: its ``gain`` (the paper), or the ``total`` gain (the released settings).
        bonus: Bonus at turning points: the ``total`` gain (the paper), the step's ``gain`` (the released settings), or
            the ``remaining`` gain :math:`r_S - r_{k-1}`.
        weight: Factor η on the bonus.
        first: Whether the first step can be a turning point.
        consistent: Whether the sign of a turning point's gain must be that of the gain that follows,
            :math:`r_S - r_k`; for the first step this takes the place of the sign of the total gain.
        balanced: Whether positive and negative bonuses of a rollout, over all ranks and the steps that are trained on,
            are made equally many; the largest stay.
        alone: Whether a bonus that is not 0 takes the place of the main reward.
    """

    def __init__(
        self,
        main: Literal["gain", "total"] = "total",
        bonus: Literal["gain", "total", "remaining"] = "gain",
        weight: float = 1.0,
        first: bool = True,
        consistent: bool = False,
        balanced: bool = False,
        alone: bool = False,
    ) -> None:
        check_choices(TurningPointCredit, main=main, bonus=bonus)
        if main == bonus:
            raise InputError(f"main={main} and bonus={bonus} must differ; TP-GRPO uses main=total and bonus=gain")
        check_range("(0, inf)", "TP-GRPO uses 1", weight=weight)
        self.main, self.bonus, self.weight = main, bonus, weight
        self.first, self.consistent, self.balanced, self.alone = first, consistent, balanced, alone

    def __call__(self, rewards: Tensor) -> Tensor:
        return self.of_steps(rewards, range(rewards.shape[1] - 1))

    def of_steps(self, rewards: Tensor, steps: Sequence[int]) -> Tensor:
        main, bonus = self.parts(rewards, steps)
        return (main + bonus)[:, list(steps)]

    def parts(self, rewards: Tensor, steps: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Compute main reward and bonus, each ``(N, S)``, float64; bonuses are balanced among ``steps``, or all."""
        rewards = to_float64(rewards)
        gains = rewards.diff(dim=1)
        values = {
            "gain": gains,
            "total": (rewards[:, -1:] - rewards[:, :1]).expand_as(gains),
            "remaining": rewards[:, -1:] - rewards[:, :-1],
        }
        turning, bonus = self.turning_points(rewards), values[self.bonus]
        if self.balanced:
            counted = torch.zeros(len(gains[0]), dtype=torch.bool, device=gains.device)
            counted[slice(None) if steps is None else list(steps)] = True
            turning = balance(turning & counted, bonus)
        bonus = torch.where(turning, self.weight * bonus, 0.0)
        main = values[self.main]
        return torch.where(bonus != 0, 0.0, main) if self.alone else main, bonus

    def turning_points(self, rewards: Tensor) -> Tensor:
        """Tell which steps are turning points, ``(N, S)`` bool, before any balancing."""
        gains, goal = rewards.diff(dim=1).sign(), (rewards[:, -1:] - rewards[:, :1]).sign()
        towards, ahead = gains * goal, gains * (rewards[:, -1:] - rewards[:, 1:]).sign() > 0
        turning = torch.zeros_like(ahead)
        turning[:, 1:] = (towards[:, :-1] < 0) & (towards[:, 1:] > 0)
        if self.consistent:
            turning &= ahead
        if self.first:
            turning[:, 0] = ahead[:, 0] if self.consistent else towards[:, 0] > 0
        return turning


def balance(turning: Tensor, bonus: Tensor) -> Tensor:
    """Keep as many positive as negative bonuses at ``turning`` points ``(N, S)``, the largest, of equal ones the first.

    Bonuses of one sign alone are all kept, as in TP-GRPO's released code; bonuses of 0 are kept in that case only.
    """
    signs = [turning & (bonus > 0), turning & (bonus < 0)]
    count = min(int(sign.sum()) for sign in signs)
    if not count:
        return turning
    kept = torch.zeros_like(turning)
    for sign in signs:
        size = torch.where(sign, bonus.abs(), -1.0).flatten()
        kept.view(-1)[size.argsort(descending=True, stable=True)[:count]] = True  # topk keeps any of equals
    return kept
