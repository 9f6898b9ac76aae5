"""``latentreward consolidate``: one file from a sharded checkpoint, or from any with its average as the weights."""

from functools import partial
from pathlib import Path
from typing import Any

from latentreward.checkpoints.files import DurableCheckpointIO
from latentreward.checkpoints.shards import read_checkpoint, require_finite
from latentreward.errors import InputError
from latentreward.settings.functions import run_plain_function


def consolidate(checkpoint: Path, output: Path, average: bool = False, overwrite: bool = False) -> None:
    """Write a checkpoint as one file, which trains on and evaluates on any number of devices.

    Needs host memory for the whole checkpoint. Nothing is put in the file's place before it is complete.

    Args:
        checkpoint: Folder of a sharded checkpoint, or a file.
        output: File to write.
        average: Whether the average of ``TrainableEMA`` becomes the weights; the file is then for evaluation, without
            optimiser and callbacks.
        overwrite: Whether ``output`` may exist.

    Raises:
        InputError: If the checkpoint is incomplete or damaged, holds no average that is asked for, or ``output``
            exists.
    """
    if output.exists() and not overwrite:
        raise InputError(f"output: {output} exists; set overwrite: true or choose another name")
    content = read_checkpoint(checkpoint)
    content = averaged(content, checkpoint) if average else content
    require_finite(content.get("state_dict", {}), f"checkpoint: {checkpoint}")
    DurableCheckpointIO().save_checkpoint(content, output)
    print(f"{output}: {len(content['state_dict'])} tensors, {output.stat().st_size / 1e6:.1f} MB")


def averaged(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The part of a checkpoint that evaluation needs, with the average in place of the weights it belongs to.

    Raises:
        InputError: If it holds no average.
    """
    states = [state for name, state in content.get("callbacks", {}).items() if name.startswith("TrainableEMA")]
    if not states or not states[0]["updates"]:
        raise InputError(f"average: {path} holds none; train with the callback TrainableEMA or set average: false")
    weights = content["state_dict"]
    merged = {**weights, **{name: value.to(weights[name].dtype) for name, value in states[0]["average"].items()}}
    dropped = ("callbacks", "optimizer_states", "lr_schedulers")
    return {**{name: value for name, value in content.items() if name not in dropped}, "state_dict": merged}


run = partial(run_plain_function, consolidate, bare=2)
