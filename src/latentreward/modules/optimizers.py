"""Construction of a module's optimiser and learning rate schedule."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from latentreward.errors import InputError
from latentreward.modules.schedules import NEVER


def single_optimizer(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    decay_vectors: bool = False,
    lr: float | None = None,
) -> Any:
    """Build one optimiser over the trainable parameters and its schedule, as ``configure_optimizers`` returns them.

    The schedule is stepped after each optimiser step. With ``decay_vectors``, vectors and scalars (biases, norms) get
    the optimiser's weight decay too. ``lr`` is the learning rate before any schedule; None keeps the optimiser's own.

    Raises:
        InputError: If the optimiser refuses its settings, or a ReduceLROnPlateau has no ``monitor``.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1 or decay_vectors]},
        {
            "params": [parameter for parameter in trained if not (parameter.ndim > 1 or decay_vectors)],
            "weight_decay": 0.0,
        },
    ]
    try:
        built = optimizer([group for group in groups if group["params"]])
    except ValueError as error:
        raise InputError(f"model.optimizer: {error}") from error
    for group in built.param_groups:
        group["lr"] = group["lr"] if lr is None else lr
    if lr_scheduler is None:
        return built
    schedule: dict[str, Any] = {"scheduler": lr_scheduler(built), "interval": "step"}
    if isinstance(schedule["scheduler"], ReduceLROnPlateau):
        if not hasattr(schedule["scheduler"], "monitor"):
            raise InputError(
                "model.lr_scheduler: ReduceLROnPlateau of torch has no monitor; take "
                "lightning.pytorch.cli.ReduceLROnPlateau, with monitor: val/accuracy and mode: max, for example"
            )
        schedule |= {"monitor": schedule["scheduler"].monitor, "interval": "epoch", "frequency": NEVER}
    return {"optimizer": built, "lr_scheduler": schedule}
