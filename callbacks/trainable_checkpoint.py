"""Checkpoints without the frozen network."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from latentreward.errors import InputError


class TrainableCheckpoint(Callback):
    """Leave frozen weights out of every checkpoint, and check on loading that nothing that trains is missing.

    Frozen weights come from the backbone's ``source`` again, so a DiNa-LRM on SD3.5-Medium takes some hundred MB
    instead of 20 GB. Works beside any ``ModelCheckpoint``; optimiser, loops and callbacks are kept as they are.

    Raises:
        InputError: On loading, naming the first weight that trains here but is not in the checkpoint, or the reverse.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: TrainableCheckpoint
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning load without the frozen weights; :meth:`on_load_checkpoint` looks after the rest."""
        pl_module.strict_loading = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights; buffers of modules that train stay."""
        frozen = frozen_names(pl_module)
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name not in frozen
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare names before anything is loaded."""
        found = set(checkpoint["state_dict"])
        known = set(pl_module.state_dict())
        missing = known - frozen_names(pl_module) - found
        for kind, names in (("lacks", missing), ("has the unknown weight", found - known)):
            if names:
                raise InputError(
                    f"the checkpoint {kind} {sorted(names)[0]} ({len(names)} in all); backbone, tuning and head must "
                    "be those it was trained with"
                )


def frozen_names(pl_module: LightningModule) -> set[str]:
    """Names of state-dict entries that never change: frozen parameters, and buffers of wholly frozen modules."""
    trains = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
    homes = {name.rpartition(".")[0] for name in trains}
    frozen = {name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad}
    return frozen | {name for name, _ in pl_module.named_buffers() if name.rpartition(".")[0] not in homes}
