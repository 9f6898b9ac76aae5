"""Accuracy and mean margin on preference pairs, and accuracy on rankings."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from latentreward.core.errors import InputError, check_choices

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


class ByNoiseLevel(WrapperMetric):
    """One copy of a metric per band of noise levels.

    Bands are [low, high); the last band includes its upper edge. Pairs outside all bands are left out.

    Args:
        metric: Metric to copy; its ``update`` takes tensors with one row per pair.
        edges: At least two ascending noise levels in [0, 1].

    Note:
        A pair scored at two levels belongs to the band of their mean: pass ``(chosen_sigmas + rejected_sigmas) / 2``.
    """

    is_differentiable, full_state_update = False, False

    def __init__(self, metric: Metric, edges: Sequence[float] = (0.0, 0.3, 0.7, 1.0)) -> None:
        super().__init__()
        edges = tuple(edges)
        if len(edges) < 2 or list(edges) != sorted(set(edges)) or not 0 <= edges[0] <= edges[-1] <= 1:
            raise InputError(f"edges = {edges} must be at least two ascending noise levels in [0, 1], e.g. 0, 0.5, 1")
        self.bands = list(pairwise(edges))
        self.metrics = nn.ModuleList(metric.clone() for _ in self.bands)

    @property
    def names(self) -> list[str]:
        """Name of each band, e.g. ``sigma_0.3_0.7``."""
        return [f"sigma_{low:g}_{high:g}" for low, high in self.bands]

    def update(self, sigmas: Tensor, *columns: Tensor) -> None:
        """Update the metric of each band with its rows, by levels ``(B,)``; ``columns`` are the metric's arguments."""
        for (low, high), metric in zip(self.bands, self.metrics, strict=True):
            # σ = 1 belongs to a band: training at pure noise happens.
            last = high == self.bands[-1][1]
            inside = (sigmas >= low) & ((sigmas <= high) if last else (sigmas < high))
            metric.update(*(column[inside] for column in columns))

    def forward(self, sigmas: Tensor, *columns: Tensor) -> dict[str, Tensor]:
        """Call :meth:`update`, and return the values over all rows seen so far, not over this batch alone."""
        self.update(sigmas, *columns)
        return self.compute()

    def compute(self) -> dict[str, Tensor]:
        """Return the value of each band by name; an empty band has the metric's value for no pairs, usually NaN."""
        return {name: metric.compute() for name, metric in zip(self.names, self.metrics, strict=True)}

    def reset(self) -> None:
        """Reset the metric of every band."""
        for metric in self.metrics:
            metric.reset()
        super().reset()
