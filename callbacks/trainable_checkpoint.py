"""Checkpoints without the frozen network."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from latentreward.checkpoints.shards import check_weights, frozen_names


class TrainableCheckpoint(Callback):
    """Leave frozen weights out of every checkpoint, and check on loading that nothing that trains is missing.

    Frozen weights come from the backbone's ``source`` again, so a DiNa-LRM on SD3.5-Medium takes some hundred MB
    instead of 20 GB; a reward module notes which base they belong to and refuses another. Works beside any
    ``ModelCheckpoint``, on one device and many, in one file or in shards; while a run is set up, the module's
    ``state_dict()`` is that of the weights that train, so frozen ones are not even gathered.

    Raises:
        InputError: On loading, naming the first weight that trains here but is not in the checkpoint, or the reverse.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: TrainableCheckpoint
    """

    def __init__(self) -> None:
        self._hook: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning save and load without the frozen weights."""
        pl_module.strict_loading = False
        if self._hook is None:
            self._hook = pl_module.register_state_dict_post_hook(drop_frozen)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its whole ``state_dict`` back."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare names before anything is loaded; a strategy that shards has loaded, and compared, already."""
        if "state_dict" in checkpoint:
            check_weights(pl_module, {name: value.shape for name, value in checkpoint["state_dict"].items()})


def drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook that drops what never changes; buffers of modules that train stay."""
    for name in frozen_names(module):
        state_dict.pop(prefix + name, None)
