"""``latentreward ui``: a page in the browser to try a reward model by hand."""

import os
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from latentreward.errors import InputError
from latentreward.scoring import PublishedSettings
from latentreward.settings.functions import run_plain_function


def ui(
    model: str,
    port: int = 7860,
    base: str | None = None,
    run_config: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    published: PublishedSettings | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
) -> None:
    """Show a page, for this machine's browsers alone, that scores images for a prompt at all noise levels.

    Args:
        model: Folder or hub id of a reward model, or a checkpoint, or the folder of a run.
        port: Port; 0 takes a free one, which is printed.
        base: Pipeline of the frozen weights, if not the one that the model names.
        run_config: Settings of the model's run, if not beside its checkpoint.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether the model's settings may name classes that are not registered, which are imported.
        published: Settings that the files of a published layout do not hold, e.g. --published.guidance 1.
        dtype: Precision of the model's backbone.
        device: E.g. cuda:1; auto takes the accelerator if there is one.

    Raises:
        InputError: If a setting is wrong, the port is taken, or the model cannot be loaded.
    """
    if find_spec("gradio") is None:
        raise InputError("ui needs gradio, which is not installed; pip install 'latentreward[ui]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import torch

    from latentreward.devices import find_device
    from latentreward.scoring import RewardModel
    from latentreward.serving.addresses import bind
    from latentreward.serving.ui import launch

    target = find_device(device)
    with bind("127.0.0.1", port) as bound:  # gradio binds by itself, after the model is loaded
        free_port = bound.getsockname()[1]
    loading: dict[str, Any] = {
        "revision": revision,
        "base": base,
        "config": run_config,
        "trust_remote_code": trust_remote_code,
    }
    loading |= {"device": target, "dtype": getattr(torch, dtype), "published": published}
    launch(RewardModel.from_pretrained(model, **loading), free_port)


run = partial(run_plain_function, ui)
