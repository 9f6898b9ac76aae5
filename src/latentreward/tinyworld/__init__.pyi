from .datamodule import TinyWorldDataModule, TinyWorldPromptDataModule

__all__ = [
    "TinyWorldDataModule",
    "TinyWorldPromptDataModule",
]
