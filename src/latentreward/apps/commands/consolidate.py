"""``latentreward consolidate``: write a sharded checkpoint as one file, or a checkpoint's average as its weights."""

from functools import partial
from pathlib import Path

from latentreward.core.checkpoints.files import DurableCheckpointIO
from latentreward.core.checkpoints.shards import read_checkpoint, require_finite
from latentreward.core.errors import InputError
from latentreward.core.settings.functions import run_function


def consolidate(checkpoint: Path, output: Path, average: bool = False, overwrite: bool = False) -> None:
    """Write a checkpoint as one file, from which training and evaluation can start on any number of devices.

    The whole checkpoint has to fit into host memory. ``output`` appears only once it is complete.

    Args:
        checkpoint: Folder of a sharded checkpoint, or a file.
        output: File to write.
        average: Whether to write the average of ``TrainableEMA`` as the weights. The file then holds no state of
            optimiser and callbacks: it is for evaluation, not for resuming.
        overwrite: Whether to replace ``output`` if it exists.
    """
    if output.exists() and not overwrite:
        raise InputError(f"output: {output} exists; set overwrite: true or choose another name")
    content = read_checkpoint(checkpoint)
    if average:
        states = [state for name, state in content.get("callbacks", {}).items() if name.startswith("TrainableEMA")]
        if not states or not states[0]["updates"]:
            remedy = "train with the callback TrainableEMA or set average: false"
            raise InputError(f"average: {checkpoint} holds none; {remedy}")
        weights = content["state_dict"]
        weights |= {name: value.to(weights[name].dtype) for name, value in states[0]["average"].items()}
        for name in ("callbacks", "optimizer_states", "lr_schedulers"):
            content.pop(name, None)
    require_finite(content.get("state_dict", {}), f"checkpoint: {checkpoint}")
    DurableCheckpointIO().save_checkpoint(content, output)
    print(f"{output}: {len(content['state_dict'])} tensors, {output.stat().st_size / 1e6:.1f} MB")


run = partial(run_function, consolidate, bare=2, classes=False)
