"""Data module of prompts and image pairs together, for alignment with a pre-training loss term."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from latentreward.data.alignment.prompts import PromptLoaders


class PromptsAndImages(LightningDataModule):
    """Data module of training batches ``{"prompts": PromptBatch, "images": PreferenceBatch}``.

    Prompts and images keep their own batch sizes, orders and positions in checkpoints. An epoch ends with the shorter
    of the two.

    Args:
        prompts: Data module of prompts to sample from; validation uses its validation loader.
        images: ``PreferenceDataModule`` or ``CachedPreferenceDataModule``; only its ``train`` split is used.
    """

    def __init__(self, prompts: PromptLoaders, images: LightningDataModule) -> None:
        super().__init__()
        self.prompts, self.images = prompts, images

    def prepare_data(self) -> None:
        """Call ``prepare_data`` of both data modules."""
        for part in (self.prompts, self.images):
            part.prepare_data()

    def setup(self, stage: str) -> None:
        """Give both data modules the trainer and set them up."""
        for part in (self.prompts, self.images):
            part.trainer = self.trainer
            part.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """Return both training loaders combined; an epoch ends with the shorter one."""
        loaders = {"prompts": self.prompts.train_dataloader(), "images": self.images.train_dataloader()}
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> Any:
        """Return the validation loader of the prompts."""
        return self.prompts.val_dataloader()
