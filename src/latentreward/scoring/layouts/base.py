"""What every trained reward model on disk promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from latentreward.backbones import DiffusionBackbone
from latentreward.contracts import LatentSpace
from latentreward.data.images import ExifOrientation
from latentreward.heads import RewardHead
from latentreward.scoring.network import RewardNetwork


class StoredReward(ABC):
    """A trained reward model on disk, of which only small files are read until its weights are asked for."""

    on_meta_device: DiffusionBackbone | None = None
    """Its backbone without any weight, if its network might be somebody else's as well."""

    @property
    def exif(self) -> ExifOrientation:
        """Whether it takes images turned upright by their EXIF orientation; the published layouts' authors did not."""
        return "ignore"

    @abstractmethod
    def latent_space(self) -> LatentSpace:
        """The latents it takes, from configs alone."""

    @abstractmethod
    def load(self) -> RewardNetwork:
        """The whole model, frozen, in evaluation mode.

        Raises:
            InputError: If a file is missing or damaged, or its weights do not fit.
        """

    def head(self) -> RewardHead:
        """The trained head alone, for features of :attr:`on_meta_device`."""
        raise NotImplementedError

    def adapter(self) -> dict[str, Tensor]:
        """The trained adapter alone, by its names in the outline's network."""
        raise NotImplementedError

    def same_base(self, part: str, weights: Mapping[str, Tensor], source: str) -> bool:
        """Whether a part was trained on these very frozen weights.

        Args:
            part: ``text_encoder``, or the name of the outline's network.
            weights: Weights by the names that they have without adapters.
            source: Where they come from.
        """
        return False


class SharingReward(StoredReward):
    """A stored reward whose network, but for its adapter, may be that of others."""

    @abstractmethod
    def _backbone(self) -> DiffusionBackbone:
        """Build the backbone, with adapters that are not yet filled; on the meta device it has shapes alone."""

    @cached_property
    def on_meta_device(self) -> DiffusionBackbone:  # type: ignore[override]
        """See :attr:`StoredReward.on_meta_device`."""
        with torch.device("meta"):
            return self._backbone()

    def latent_space(self) -> LatentSpace:
        """See :meth:`StoredReward.latent_space`."""
        return self.on_meta_device.latent_space
