"""Pairwise accuracy on rankings, over all pairs of images that share a prompt."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class GroupPairAccuracy(MeanMetric):
    """Share of image pairs within a prompt group whose scores have the same order as the human ranks.

    A pair whose scores or whose ranks are equal counts as wrong, as in DiNa-LRM's released evaluation
    (arXiv:2602.11146). NaN if no group has two images.
    """

    is_differentiable, higher_is_better = False, True  # type: ignore[assignment]  # None of all means

    def update(self, scores: Tensor, ranks: Tensor, groups: Tensor | None = None) -> None:
        """Count the pairs of complete groups.

        Args:
            scores: ``(N,)`` rewards.
            ranks: ``(N,)`` human ranks, lower is better.
            groups: ``(N,)`` number of the image's prompt group; None treats all N images as one group.
        """
        groups = torch.zeros_like(ranks) if groups is None else groups
        first, second = torch.triu_indices(len(scores), len(scores), offset=1, device=scores.device)
        together = groups[first] == groups[second]
        by_score = torch.sign(scores[first] - scores[second])
        # The lower rank is the better one, so the sides are exchanged.
        by_rank = torch.sign(ranks[second] - ranks[first])
        super().update((by_score * by_rank > 0)[together].float())
