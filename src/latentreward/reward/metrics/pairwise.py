"""Accuracy and mean margin on preference pairs, and accuracy on rankings."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from latentreward.core.errors import check_choices

Equal = Literal["wrong", "half"]


def preferred_margin(chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor) -> Tensor:
    """Compute the reward of the preferred image minus that of the other, flat and float32; ties are left out.

    Rewards are ``(B,)`` or ``(B, out_dim)``, of which every column counts as a comparison. The label ``(B,)`` is the
    probability that chosen wins; below ½ the rejected image is the preferred one, at ½ the pair is a tie.
    """
    margin = chosen_rewards.detach().float() - rejected_rewards.detach().float()
    side = torch.sign(label.float() - 0.5)
    decided = side != 0
    return (margin[decided] * side[decided].reshape(-1, *[1] * (margin.ndim - 1))).flatten()


class PairwiseAccuracy(MeanMetric):
    """Share of pairs whose preferred image scores higher; pairs labelled ½ are left out. NaN without any other pair.

    Args:
        equal: Credit of equal rewards: ``wrong`` counts 0, so that a constant reward has accuracy 0; ``half`` counts ½.
        kwargs: For ``torchmetrics.Metric``.
    """

    is_differentiable, higher_is_better = False, True  # type: ignore[assignment]  # None of all means

    def __init__(self, equal: Equal = "wrong", **kwargs: Any) -> None:
        # torchmetrics would drop NaN with a warning in each batch, and wait for the device to find them.
        super().__init__(nan_strategy="disable", **kwargs)
        check_choices(PairwiseAccuracy, equal=equal)
        self.equal = equal

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor) -> None:
        """Count pairs; arguments as in :func:`preferred_margin`."""
        super().update(self.credit(preferred_margin(chosen_rewards, rejected_rewards, label)))

    def credit(self, margin: Tensor) -> Tensor:
        """Return the credit of each margin: 1 above zero, 0 below zero, and at zero that of ``equal``."""
        hits = (margin > 0).float()
        return hits + 0.5 * (margin == 0) if self.equal == "half" else hits


class MeanMargin(MeanMetric):
    """Mean margin of the preferred image in reward units; pairs labelled ½ are left out. NaN without any other pair."""

    is_differentiable, higher_is_better = False, True  # type: ignore[assignment]  # None of all means

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nan_strategy="disable", **kwargs)

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor) -> None:
        """Add pairs; arguments as in :func:`preferred_margin`."""
        super().update(preferred_margin(chosen_rewards, rejected_rewards, label))


class MeanLoss(MeanMetric):
    """Mean of a loss over the pairs of many batches, weighted as within a batch. NaN if that of a batch is NaN."""

    is_differentiable, higher_is_better = False, False  # type: ignore[assignment]  # None of all means

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nan_strategy="disable", **kwargs)

    def update(self, loss: Tensor, weight: Tensor) -> None:
        """Add a batch's weighted mean ``loss``, a scalar, over pairs with ``weight`` ``(B,)``."""
        total = weight.sum()
        self.mean_value += loss * total  # by hand: the base class drops weights under this nan_strategy
        self.weight += total


class GroupPairAccuracy(MeanMetric):
    """Share of image pairs within a prompt group whose scores have the same order as the human ranks.

    A pair whose scores or whose ranks are equal counts as wrong, as in DiNa-LRM's released evaluation
    (arXiv:2602.11146). NaN if no group has two images.
    """

    is_differentiable, higher_is_better = False, True  # type: ignore[assignment]  # None of all means

    def update(self, scores: Tensor, ranks: Tensor, groups: Tensor | None = None) -> None:
        """Count the pairs of complete groups, from rewards, human ranks (lower is better) and groups, all ``(N,)``.

        Without ``groups`` all N images are one group.
        """
        groups = torch.zeros_like(ranks) if groups is None else groups
        first, second = torch.triu_indices(len(scores), len(scores), offset=1, device=scores.device)
        together = groups[first] == groups[second]
        by_score = torch.sign(scores[first] - scores[second])
        # The lower rank is the better one, so the sides are exchanged.
        by_rank = torch.sign(ranks[second] - ranks[first])
        super().update((by_score * by_rank > 0)[together].float())
