"""Callbacks for what trains: a moving average of its weights, and checkpoints without the frozen ones."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from latentreward.core.checkpoints.shards import check_weights, frozen_names, placed_like, whole_tensor
from latentreward.core.errors import InputError, check_range


class TrainableCheckpoint(Callback):
    """Callback that leaves frozen weights out of checkpoints, and checks that no trainable weight is missing.

    Frozen weights are loaded from the backbone's ``source`` again, so a DiNa-LRM on SD3.5-Medium takes some hundred MB
    instead of 20 GB. A reward module records which base its weights belong to, and refuses a checkpoint of another
    base. The callback works with any ``ModelCheckpoint``, on one or several devices, with single-file and sharded
    checkpoints. During a run the module's ``state_dict()`` holds only the trainable weights, so that frozen weights
    are not even gathered.

    Raises:
        InputError: On loading, if a trainable weight is not in the checkpoint or the reverse; names the first such
            weight.

    Example:
        ``--trainer.callbacks+=TrainableCheckpoint``
    """

    def __init__(self) -> None:
        self._hook: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make Lightning save and load without the frozen weights."""
        pl_module.strict_loading = False
        self.teardown(trainer, pl_module, stage)  # of a run that an error ended, perhaps of another module
        self._hook = pl_module.register_state_dict_post_hook(drop_frozen)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's full ``state_dict``."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the names before weights are loaded; a sharding strategy has checked and loaded them already."""
        if "state_dict" in checkpoint:
            check_weights(pl_module, {name: value.shape for name, value in checkpoint["state_dict"].items()})


def drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Drop frozen weights from a state dict (as a hook); buffers of modules that train stay."""
    for name in frozen_names(module):
        state_dict.pop(prefix + name, None)


class TrainableEMA(Callback):
    """Callback that keeps an exponential moving average of the trainable parameters, in float32.

    Validation, test and prediction use the average.

    ``average ← decay · average + (1 − decay) · weights`` after each optimiser step. Training uses the raw weights,
    which are restored before a checkpoint is written. The average is saved in the checkpoint, in this callback's state,
    so a resumed run equals an uninterrupted one. ``latentreward consolidate --average=true`` writes a checkpoint whose
    weights are the average.

    Where weights are sharded (FSDP2), the average is sharded too. Rank 0 saves the whole average, in single-file and
    sharded checkpoints alike, so that it can be loaded on any number of devices.

    Args:
        decay: In [0, 1); DiNa-LRM's config has 0.995 (arXiv:2602.11146; its released code never applied it).
        warm_up: Whether the decay is limited to (1 + n) / (10 + n) at the n-th step, so that the initial weights fade
            quickly; false uses ``decay`` from the first step, as DiNa-LRM's released code would.

    Note:
        Lightning's ``WeightAveraging`` is not used: it copies the whole module, frozen network included, and a run
        shorter than its start-up ends with the *initial* weights.

    Example:
        ``--trainer.callbacks+=TrainableEMA --trainer.callbacks.decay=0.995``
    """

    def __init__(self, decay: float = 0.995, warm_up: bool = True) -> None:
        check_range("[0, 1)", "DiNa-LRM's config has 0.995", decay=decay)
        self.decay, self.warm_up = decay, warm_up
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._last_step = 0
        self._raw: dict[str, Tensor] = {}

    @staticmethod
    def _trained(pl_module: LightningModule) -> dict[str, Parameter]:
        return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise InputError under FSDP1, whose shards cannot be averaged; warn of checkpoints without the average."""
        if isinstance(trainer.strategy, FSDPStrategy):
            raise InputError("TrainableEMA does not work with the strategy fsdp; use fsdp2 or ddp")
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            rank_zero_warn("TrainableEMA: checkpoints with save_weights_only hold the raw weights and no average")

    def _place(self, pl_module: LightningModule) -> dict[str, Parameter]:
        """Place the average on the weights' devices, or start it from the weights; return the trainable weights."""
        weights = self._trained(pl_module)
        if self.average and self.average.keys() != weights.keys():
            raise InputError(
                f"the checkpoint's average lacks or adds {sorted(self.average.keys() ^ weights.keys())[0]}; tuning and "
                "head must be those it was trained with"
            )
        for name, weight in weights.items():
            self.average[name] = placed_like(self.average.get(name, weight.detach()), weight)
        return weights

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the average from the initial weights, or continue the checkpoint's average."""
        self._place(pl_module)
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update the average once per optimiser step, not per accumulated batch."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm_up else self.decay
        trained = self._trained(pl_module)
        for sharded in (False, True):  # PyTorch mixes no sharded weights with whole ones
            names = [name for name, weight in trained.items() if isinstance(weight, DTensor) is sharded]
            if names:  # in float32: at decay 0.9999 a bfloat16 average would not move; a few kernels for all weights
                weights = [trained[name].float() for name in names]
                torch._foreach_lerp_([self.average[name] for name in names], weights, 1 - decay)

    @torch.no_grad()
    def _swap_out(self, pl_module: LightningModule) -> None:
        for name, weight in self._trained(pl_module).items():
            if name in self._raw:
                weight.copy_(self._raw[name])
        self._raw = {}

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the average in validation, test and prediction."""
        if not self.updates or self._raw:
            return
        weights = self._place(pl_module)
        self._raw = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self.average[name])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the raw weights; ``ModelCheckpoint`` saves after this hook."""
        self._swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the raw weights, so that the average never stays in the module."""
        self._swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole average (on rank 0 only) and the number of updates; collective if it is sharded."""
        average = {}
        for name, value in self.average.items():
            whole = whole_tensor(value)
            if not distributed.is_initialized() or distributed.get_rank() == 0:
                average[name] = whole
        return {"average": average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average and the number of updates that :meth:`state_dict` returned."""
        self.average, self.updates = dict(state_dict["average"]), state_dict["updates"]
