"""Accuracy over rankings: all pairs of images that share a prompt."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class GroupPairAccuracy(Metric):
    """Share of image pairs within a prompt group that scores order as human ranks do.

    A pair whose scores or whose ranks are equal counts as wrong, as in DiNa-LRM's released evaluation
    (arXiv:2602.11146).
    """

    is_differentiable, higher_is_better, full_state_update = False, True, False
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor, ranks: Tensor, groups: Tensor | None = None) -> None:
        """Count the pairs of complete groups.

        Args:
            scores: ``(N,)`` rewards.
            ranks: ``(N,)``, lower is better.
            groups: ``(N,)`` equal numbers for images of one prompt; None takes all N as one group.
        """
        groups = torch.zeros_like(ranks) if groups is None else groups
        first, second = torch.triu_indices(len(scores), len(scores), offset=1, device=scores.device)
        together = groups[first] == groups[second]
        by_score = torch.sign(scores[first] - scores[second])
        by_rank = torch.sign(ranks[second] - ranks[first])
        self.correct += (together & (by_score * by_rank > 0)).sum()
        self.total += together.sum()

    def compute(self) -> Tensor:
        """Accuracy in [0, 1]; NaN if no group had two images."""
        return self.correct / self.total
