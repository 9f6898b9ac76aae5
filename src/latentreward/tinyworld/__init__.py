"""A tiny world of coloured shapes: scenes, a pixel oracle, preference data sets, and two pretrained pipelines."""

import importlib
from typing import Any

DATA_MODULES = {"TinyWorldDataModule": "datamodule", "TinyWorldPromptDataModule": "prompts"}


def __getattr__(name: str) -> Any:
    """Import the data modules when they are asked for: drawing and pretraining do without Lightning."""
    if name in DATA_MODULES:
        return getattr(importlib.import_module(f"{__name__}.{DATA_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
