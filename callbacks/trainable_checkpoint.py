"""Callback that leaves frozen weights out of checkpoints."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from latentreward.core.checkpoints.shards import check_weights, frozen_names


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
