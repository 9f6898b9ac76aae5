"""Credit: a reward of each step of a trajectory, from a reward of each of its states."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from latentreward.core.contracts import to_float64
from latentreward.core.errors import InputError, check_choices, check_range
from latentreward.core.promises import Part, returns, tensor


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
