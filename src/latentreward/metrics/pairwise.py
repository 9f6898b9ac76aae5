"""How often, and by how much, the preferred image of a pair scores higher."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from latentreward.errors import InputError, did_you_mean

Equal = Literal["wrong", "half"]


def preferred_margin(chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor) -> Tensor:
    """Reward lead of the preferred image, pairs without one (label ½) left out.

    Args:
        chosen_rewards: ``(B,)`` or ``(B, out_dim)``; every column counts as a comparison.
        rejected_rewards: Same shape.
        label: ``(B,)`` probability that chosen wins; below ½ the rejected image is the preferred one.

    Returns:
        Flat float32, one lead per decided pair and column.
    """
    margin = chosen_rewards.detach().float() - rejected_rewards.detach().float()
    side = torch.sign(label.float() - 0.5)
    decided = side != 0
    return (margin[decided] * side[decided].reshape(-1, *[1] * (margin.ndim - 1))).flatten()


class PairwiseAccuracy(Metric):
    """Share of pairs whose preferred image scores higher; pairs labelled ½ are left out.

    Args:
        equal: Equal rewards count as ``wrong``, so that a constant reward has accuracy 0, or as ``half`` a hit.
        kwargs: For ``torchmetrics.Metric``.

    Raises:
        InputError: If ``equal`` is neither.
    """

    is_differentiable, higher_is_better, full_state_update = False, True, False
    correct: Tensor
    total: Tensor

    def __init__(self, equal: Equal = "wrong", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if equal not in get_args(Equal):
            raise InputError(f"equal = {equal!r} is not known{did_you_mean(str(equal), get_args(Equal))}")
        self.equal = equal
        self.add_state("correct", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor) -> None:
        """Count pairs; arguments as in :func:`preferred_margin`."""
        margin = preferred_margin(chosen_rewards, rejected_rewards, label)
        self.correct += (margin > 0).sum()
        if self.equal == "half":
            self.correct += 0.5 * (margin == 0).sum()
        self.total += margin.numel()

    def compute(self) -> Tensor:
        """Accuracy in [0, 1]; NaN if no decided pair was seen."""
        return self.correct / self.total


class MeanMargin(Metric):
    """Mean reward lead of the preferred image, in reward units; pairs labelled ½ are left out."""

    is_differentiable, higher_is_better, full_state_update = False, True, False
    margin_sum: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("margin_sum", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor) -> None:
        """Add pairs; arguments as in :func:`preferred_margin`."""
        margin = preferred_margin(chosen_rewards, rejected_rewards, label)
        self.margin_sum += margin.sum()
        self.total += margin.numel()

    def compute(self) -> Tensor:
        """Mean lead; NaN if no decided pair was seen."""
        return self.margin_sum / self.total
