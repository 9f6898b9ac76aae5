"""How often, and by how much, the preferred image of a pair scores higher."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import MeanMetric

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


class PairwiseAccuracy(MeanMetric):
    """Share of pairs whose preferred image scores higher; pairs labelled ½ are left out, NaN if there are no others.

    Args:
        equal: Equal rewards count as ``wrong``, so that a constant reward has accuracy 0, or as ``half`` a hit.
        kwargs: For ``torchmetrics.Metric``.

    Raises:
        InputError: If ``equal`` is neither.
    """

    is_differentiable, higher_is_better = False, True  # type: ignore[assignment]  # None of all means

    def __init__(self, equal: Equal = "wrong", **kwargs: Any) -> None:
        super().__init__(nan_strategy="disable", **kwargs)
        if equal not in get_args(Equal):
            raise InputError(f"equal = {equal!r} is not known{did_you_mean(str(equal), get_args(Equal))}")
        self.equal = equal

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor) -> None:
        """Count pairs; arguments as in :func:`preferred_margin`."""
        margin = preferred_margin(chosen_rewards, rejected_rewards, label)
        hits = (margin > 0).float()
        super().update(hits + 0.5 * (margin == 0) if self.equal == "half" else hits)


class MeanMargin(MeanMetric):
    """Mean reward lead of the preferred image, in reward units; pairs labelled ½ are left out, NaN without others."""

    is_differentiable, higher_is_better = False, True  # type: ignore[assignment]  # None of all means

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nan_strategy="disable", **kwargs)

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor) -> None:
        """Add pairs; arguments as in :func:`preferred_margin`."""
        super().update(preferred_margin(chosen_rewards, rejected_rewards, label))
