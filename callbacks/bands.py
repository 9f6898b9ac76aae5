"""Callback that logs rollouts and training steps by bands of the timestep."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from latentreward.alignment import StepRatios
from latentreward.core.contracts import RolloutStatistics
from latentreward.core.errors import InputError
from latentreward.reward import gather_with_grad


class TimestepBands(Callback):
    """Callback that logs rollouts and training steps by bands of the timestep; bands without rows are left out.

    For each rollout of a module that learns from its own rollouts: ``rollout/kept_share_t_{low}_{high}``, the share of
    candidate groups that are kept for training, and the quartiles of the score gaps tanh(Δ/2) between best and worst
    candidate, ``rollout/gap_25_t_...``, ``gap_50`` and ``gap_75``, which help to choose selection thresholds. For
    training on pairs (LPO, SPO): ``train/implicit_accuracy_t_...``, the share of pairs whose better state has gained
    more log-probability over the reference than the worse state, and ``train/margin_t_...``, the mean difference of
    the two gains. All are over the rows of all ranks.

    Args:
        edges: Ascending timesteps; bands are [low, high), the last one closed.

    Example:
        ``--trainer.callbacks+=TimestepBands --trainer.callbacks.edges=[0,250,500,750,1000]``
    """

    def __init__(self, edges: Sequence[float] = (0.0, 250.0, 500.0, 750.0, 1000.0)) -> None:
        if len(edges) < 2 or list(edges) != sorted(set(edges)):
            raise InputError(f"edges={list(edges)} of TimestepBands must be at least two ascending timesteps")
        self.edges = tuple(edges)
        self._seen: RolloutStatistics | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        statistics = getattr(pl_module, "rollout_statistics", None)
        if statistics is None or statistics is self._seen:
            return
        self._seen, values = statistics, {}
        for band, rows in self._bands(statistics.timesteps):
            quartiles = statistics.gap[rows].float().flatten().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            values[f"rollout/kept_share_{band}"] = statistics.kept[rows].float().mean().item()
            values |= {f"rollout/gap_{name}_{band}": value for name, value in zip((25, 50, 75), quartiles, strict=True)}
        pl_module.log_dict(values)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        ratios = outputs.get("ratios") if isinstance(outputs, dict) else None
        if not isinstance(ratios, StepRatios):
            return
        values = {}
        # One collective call for both columns.
        pairs = torch.stack([ratios.timesteps.to(ratios.chosen), ratios.chosen - ratios.rejected], dim=1)
        timesteps, margins = gather_with_grad(pairs).unbind(dim=1)  # without gradient, as these have none
        for band, rows in self._bands(timesteps):
            values[f"train/implicit_accuracy_{band}"] = (margins[rows] > 0).float().mean()
            values[f"train/margin_{band}"] = margins[rows].mean()
        pl_module.log_dict(values, batch_size=len(batch))

    def _bands(self, timesteps: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and row indices of each band that has rows."""
        for low, high in pairwise(self.edges):
            upper = timesteps <= high if high == self.edges[-1] else timesteps < high
            rows = ((timesteps >= low) & upper).nonzero().flatten()
            if len(rows):
                yield f"t_{low:g}_{high:g}", rows
