"""A tiny world of coloured shapes: scenes, an oracle that judges pixels, preference data, two pretrained pipelines."""

import importlib
from typing import Any

DATA_MODULES = {"TinyWorldDataModule": "datamodule", "TinyWorldPromptDataModule": "prompts"}


def __getattr__(name: str) -> Any:
    """Import the data modules on first use, because drawing and pretraining do not need Lightning."""
    if name in DATA_MODULES:
        return getattr(importlib.import_module(f"{__name__}.{DATA_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
