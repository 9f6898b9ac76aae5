"""An average of the weights that train, and of nothing else."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter

from latentreward.errors import InputError


class TrainableEMA(Callback):
    """Exponential moving average of the trainable parameters, in float32; validation and test see the average.

    ``average ← decay · average + (1 − decay) · weights`` after each optimiser step, with decay limited to
    (1 + n) / (10 + n) at the n-th step, so that the initial weights fade at once. Training goes on with the raw
    weights; they are back before a checkpoint is written. The average is part of the checkpoint (under this callback's
    state), so a resumed run equals the uninterrupted one.

    Args:
        decay: In [0, 1); DiNa-LRM's config has 0.995 (arXiv:2602.11146; its released code never applied it).

    Raises:
        InputError: If ``decay`` is out of range, or a checkpoint's average belongs to other weights.

    Note:
        Lightning's ``WeightAveraging`` copies the whole module, frozen network included, and a run shorter than its
        start-up leaves the *initial* weights behind; hence this one.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: TrainableEMA
                  init_args: {decay: 0.995}
    """

    def __init__(self, decay: float = 0.995) -> None:
        if not 0.0 <= decay < 1.0:
            raise InputError(f"decay={decay:g} must lie in [0, 1)")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._last_step = 0
        self._raw: dict[str, Tensor] = {}

    @staticmethod
    def _trained(pl_module: LightningModule) -> dict[str, Parameter]:
        return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

    def _check_names(self, weights: dict[str, Parameter]) -> None:
        if self.average and self.average.keys() != weights.keys():
            raise InputError(
                f"the checkpoint's average lacks or adds {sorted(self.average.keys() ^ weights.keys())[0]}; tuning and "
                "head must be those it was trained with"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the initial weights, or go on from the checkpoint's average."""
        weights = self._trained(pl_module)
        self._check_names(weights)
        self.average = {
            name: self.average.get(name, weight.detach()).to(weight.device, torch.float32, copy=True)
            for name, weight in weights.items()
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where a resumed run stands, which is not known before: steps of before it are averaged already."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update once per optimiser step, not per accumulated batch."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, weight in self._trained(pl_module).items():
            self.average[name].lerp_(weight.float(), 1 - decay)

    @torch.no_grad()
    def _swap_in(self, pl_module: LightningModule) -> None:
        if not self.updates or self._raw:
            return
        weights = self._trained(pl_module)
        self._check_names(weights)
        self._raw = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self.average[name].to(weight.device))

    @torch.no_grad()
    def _swap_out(self, pl_module: LightningModule) -> None:
        for name, weight in self._trained(pl_module).items():
            if name in self._raw:
                weight.copy_(self._raw[name])
        self._raw = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the average."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the raw weights; ``ModelCheckpoint`` saves after this."""
        self._swap_out(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test with the average of the loaded checkpoint."""
        self._swap_in(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the raw weights back."""
        self._swap_out(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the average of the loaded checkpoint."""
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the raw weights back."""
        self._swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Never leave the average behind in the module that trains."""
        self._swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The average and its count; plain tensors, so that loading needs no pickle."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.average, self.updates = dict(state_dict["average"]), state_dict["updates"]
