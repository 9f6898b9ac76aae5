from .datamodule import TinyWorldDataModule
from .prompts import TinyWorldPromptDataModule

__all__ = [
    "TinyWorldDataModule",
    "TinyWorldPromptDataModule",
]
