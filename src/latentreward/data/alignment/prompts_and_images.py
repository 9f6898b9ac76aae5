"""Prompts beside images: what alignment with a pre-training term trains on."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from latentreward.data.alignment.prompts import PromptLoaders


class PromptsAndImages(LightningDataModule):
    """Training batches ``{"prompts": PromptBatch, "images": PreferenceBatch}``.

    Each keeps its own batch size, order and place in checkpoints. An epoch is as long as the shorter of the two.

    Args:
        prompts: Prompts to sample from; its validation prompts are validated on.
        images: ``PreferenceDataModule``, or ``CachedPreferenceDataModule``, of which ``train`` is used.
    """

    def __init__(self, prompts: PromptLoaders, images: LightningDataModule) -> None:
        super().__init__()
        self.prompts, self.images = prompts, images

    def prepare_data(self) -> None:
        """Let both prepare their data."""
        for part in (self.prompts, self.images):
            part.prepare_data()

    def setup(self, stage: str) -> None:
        """Set both up under the same trainer."""
        for part in (self.prompts, self.images):
            part.trainer = self.trainer
            part.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """Both loaders, side by side."""
        loaders = {"prompts": self.prompts.train_dataloader(), "images": self.images.train_dataloader()}
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> Any:
        """Of the prompts."""
        return self.prompts.val_dataloader()
