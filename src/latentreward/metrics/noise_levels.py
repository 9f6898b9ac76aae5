"""Any metric, split by the noise level at which a pair was scored."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from latentreward.errors import InputError


class ByNoiseLevel(WrapperMetric):
    """One copy of a metric per band of noise levels.

    Bands are [low, high), the last one closed. Pairs outside all bands are left out.

    Args:
        metric: Template; its ``update`` takes tensors with one row per pair.
        edges: At least two ascending noise levels in [0, 1].

    Raises:
        InputError: If ``edges`` are not that.

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
        """Give each band its rows.

        Args:
            sigmas: ``(B,)`` noise levels.
            columns: What the metric's ``update`` takes, each ``(B, ...)``.
        """
        for (low, high), metric in zip(self.bands, self.metrics, strict=True):
            last = high == self.bands[-1][1]
            inside = (sigmas >= low) & ((sigmas <= high) if last else (sigmas < high))
            metric.update(*(column[inside] for column in columns))

    def forward(self, sigmas: Tensor, *columns: Tensor) -> dict[str, Tensor]:
        """Update, and return the values of all rows seen so far."""
        self.update(sigmas, *columns)
        return self.compute()

    def compute(self) -> dict[str, Tensor]:
        """Value of each band by name; what the metric says about no pair (NaN here) in empty bands."""
        return {name: metric.compute() for name, metric in zip(self.names, self.metrics, strict=True)}

    def reset(self) -> None:
        """Forget all pairs."""
        for metric in self.metrics:
            metric.reset()
        super().reset()
