"""``latentreward consolidate``: write a sharded checkpoint as one file, or a checkpoint's average as its weights."""

from functools import partial
from pathlib import Path
from typing import Any

from latentreward.checkpoints.files import DurableCheckpointIO
from latentreward.checkpoints.shards import read_checkpoint, require_finite
from latentreward.errors import InputError
from latentreward.settings.functions import run_function


def consolidate(checkpoint: Path, output: Path, average: bool = False, overwrite: bool = False) -> None:
    """Write a checkpoint as one file, from which training and evaluation can start on any number of devices.

    The whole checkpoint has to fit into host memory. ``output`` appears only once it is complete.

    Args:
        checkpoint: Folder of a sharded checkpoint, or a file.
        output: File to write.
        average: Whether to write the average of ``TrainableEMA`` as the weights. The file then holds no state of
            optimiser and callbacks: it is for evaluation, not for resuming.
        overwrite: Whether to replace ``output`` if it exists.

    Raises:
        InputError: If the checkpoint is incomplete or damaged, ``average`` is set and the checkpoint holds no average,
            or ``output`` exists and ``overwrite`` is not set.
    """
    if output.exists() and not overwrite:
        raise InputError(f"output: {output} exists; set overwrite: true or choose another name")
    content = read_checkpoint(checkpoint)
    content = averaged(content, checkpoint) if average else content
    require_finite(content.get("state_dict", {}), f"checkpoint: {checkpoint}")
    DurableCheckpointIO().save_checkpoint(content, output)
    print(f"{output}: {len(content['state_dict'])} tensors, {output.stat().st_size / 1e6:.1f} MB")


def averaged(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint's content for evaluation, with weights replaced by their average where one is kept."""
    states = [state for name, state in content.get("callbacks", {}).items() if name.startswith("TrainableEMA")]
    if not states or not states[0]["updates"]:
        raise InputError(f"average: {path} holds none; train with the callback TrainableEMA or set average: false")
    weights = content["state_dict"]
    merged = {**weights, **{name: value.to(weights[name].dtype) for name, value in states[0]["average"].items()}}
    dropped = ("callbacks", "optimizer_states", "lr_schedulers")
    return {**{name: value for name, value in content.items() if name not in dropped}, "state_dict": merged}


run = partial(run_function, consolidate, bare=2, classes=False)
