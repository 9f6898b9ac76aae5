"""Wrapper that computes a metric separately for bands of noise levels."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from latentreward.core.errors import InputError


class ByNoiseLevel(WrapperMetric):
    """One copy of a metric per band of noise levels.

    Bands are [low, high); the last band includes its upper edge. Pairs outside all bands are left out.

    Args:
        metric: Metric to copy; its ``update`` takes tensors with one row per pair.
        edges: At least two ascending noise levels in [0, 1].

    Raises:
        InputError: If ``edges`` are fewer than two, do not ascend, or leave [0, 1].

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
        """Update the metric of each band with the rows in the band.

        Args:
            sigmas: ``(B,)`` noise levels of the rows.
            columns: Arguments of the metric's ``update``, each ``(B, ...)``.
        """
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
