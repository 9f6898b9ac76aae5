from .datamodule import TinyWorldDataModule, TinyWorldEditPromptDataModule, TinyWorldPromptDataModule

__all__ = [
    "TinyWorldDataModule",
    "TinyWorldEditPromptDataModule",
    "TinyWorldPromptDataModule",
]
