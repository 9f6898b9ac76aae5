"""Callback that logs pair accuracy by noise level."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from latentreward.core.errors import InputError
from latentreward.reward import ByNoiseLevel, PairwiseAccuracy
from latentreward.reward.modules.reward import PairModule


class NoiseBandAccuracy(Callback):
    """Callback that logs pair accuracy per band of the noise level, in training and validation.

    Reads the ``ScoredPairs`` that the steps of a ``PairModule`` return; logs ``train/accuracy_sigma_{low}_{high}``
    and ``val/accuracy_sigma_{low}_{high}`` at the end of each epoch. Bands without a pair are left out.

    Args:
        edges: Ascending noise levels in [0, 1]; bands are [low, high), the last one closed.

    Raises:
        InputError: If ``edges`` are not ascending levels in [0, 1], or the module scores no pairs.

    Example:
        ``--trainer.callbacks+=NoiseBandAccuracy --trainer.callbacks.edges=[0,0.25,0.5,0.75,1]``
    """

    def __init__(self, edges: Sequence[float] = (0.0, 0.3, 0.7, 1.0)) -> None:
        self.metrics = {stage: ByNoiseLevel(PairwiseAccuracy(), edges) for stage in ("train", "val")}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise InputError for a module that scores no pairs."""
        if not isinstance(pl_module, PairModule):
            raise InputError(f"NoiseBandAccuracy: {type(pl_module).__name__} scores no pairs; leave it out")

    def _update(self, stage: str, pl_module: LightningModule, scored: Any) -> None:
        sigmas = (scored.chosen_sigmas + scored.rejected_sigmas) / 2
        # Lightning moves the module alone; metrics of a callback stay on the CPU.
        metric = self.metrics[stage].to(pl_module.device)
        sigmas = torch.where(scored.weight > 0, sigmas, torch.nan)  # pairs of weight 0 are in no band
        metric.update(sigmas, scored.chosen, scored.rejected, scored.label)

    def _log(self, stage: str, pl_module: LightningModule) -> None:
        for name, value in self.metrics[stage].compute().items():
            if not value.isnan():
                pl_module.log(f"{stage}/accuracy_{name}", value, sync_dist=True)
        self.metrics[stage].reset()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Add the pairs of a training step."""
        self._update("train", pl_module, outputs["scored"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracies of the epoch and reset them."""
        self._log("train", pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Add the pairs of a validation step, at every evaluation level."""
        self._update("val", pl_module, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracies of the epoch and reset them."""
        self._log("val", pl_module)
