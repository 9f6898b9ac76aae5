"""``latentreward ui``: open a browser page to try a reward model by hand."""

import os
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from latentreward.apps.commands.serve import load_reward
from latentreward.contracts import PathText
from latentreward.errors import InputError
from latentreward.scoring import ModelSource
from latentreward.settings.functions import run_function


def ui(
    model: PathText,
    port: int = 7860,
    run_config: PathText | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    **loading: Any,
) -> None:
    """Serve a web page that scores images for a prompt at all noise levels; only this machine can open the page.

    Args:
        model: Folder or hub id of a reward model, or a checkpoint, or the folder of a run.
        port: Port to listen on; 0 takes a free port and prints it.
        run_config: Config file of the model's training run; by default the one beside the checkpoint.
        dtype: Precision of the model's backbone.
        device: Device, e.g. cuda:1; auto takes an accelerator if there is one.
        loading: See :class:`~latentreward.scoring.ModelSource`.

    Raises:
        InputError: If a setting is wrong, the port is taken, or the model cannot be loaded.
    """
    if find_spec("gradio") is None:
        raise InputError("ui needs gradio, which is not installed; pip install 'latentreward[ui]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from latentreward.apps.serving.addresses import bind
    from latentreward.apps.serving.ui import launch

    # gradio binds only after the model is loaded, so this checks early that the port is free.
    with bind("127.0.0.1", port) as bound:
        free_port = bound.getsockname()[1]
    launch(load_reward(ModelSource(model, config=run_config, **loading), device, dtype, "ui"), free_port)


run = partial(run_function, ui, classes=False)
