"""Base classes of the layouts in which a trained reward model lies on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from latentreward.backbones import DiffusionBackbone
from latentreward.contracts import LatentSpace
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation
from latentreward.heads import RewardHead
from latentreward.scoring.network import RewardNetwork


class StoredReward(ABC):
    """Trained reward model on disk; constructing an object reads only small files.

    In alignment, a reward that was trained as a LoRA adapter on the policy's base can run on the policy's own network.
    :attr:`on_meta_device`, :meth:`same_base`, :meth:`head` and :meth:`adapter` serve that case: they show whether the
    reward fits the policy, and load the reward's head and adapter without its base.
    """

    on_meta_device: DiffusionBackbone | None = None
    """Backbone on the meta device (shapes without weights); None if this layout cannot run on a policy's network."""

    @property
    def exif(self) -> ExifOrientation:
        """Handling of images' EXIF orientation, ``apply`` or ``ignore``; ``ignore`` for the published layouts."""
        return "ignore"

    @property
    def image_sizes(self) -> ImageSizes | None:
        """Rule by which the training images were resized; None if not recorded, as in the published layouts."""
        return None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the two outputs of a head with axes, from its settings; empty for a head with one score."""
        return ()

    @abstractmethod
    def latent_space(self) -> LatentSpace:
        """Return the latent space of the latents that the model scores, from config files alone."""

    @abstractmethod
    def load(self) -> RewardNetwork:
        """Load the whole model, frozen and in evaluation mode.

        Raises:
            InputError: If a file is missing or damaged, or the weights do not fit.
        """

    def head(self) -> RewardHead:
        """Load only the trained head, built for the features of :attr:`on_meta_device`."""
        raise NotImplementedError

    def adapter(self) -> dict[str, Tensor]:
        """Read only the trained LoRA tensors, by their names in the network of :attr:`on_meta_device`."""
        raise NotImplementedError

    def same_base(self, part: str, weights: Mapping[str, Tensor], source: str) -> bool:
        """Tell whether the model was trained on the given pretrained weights.

        A few values of each weight are compared with the values that were recorded in training; the result is False if
        none were recorded.

        Args:
            part: Part of the backbone that ``weights`` belong to: ``text_encoder``, or the ``network_name`` of
                :attr:`on_meta_device`.
            weights: Pretrained weights, by their names in the part without adapters.
            source: Folder or hub id of the weights. The published DiNa-LRM layout, which records no values, compares
                this name instead.
        """
        return False


class SharingReward(StoredReward):
    """Stored reward that can run on the network of a policy, with the reward's adapter added."""

    @abstractmethod
    def _backbone(self) -> DiffusionBackbone:
        """Build the backbone with initialised adapters; under ``torch.device("meta")`` it has shapes but no weights."""

    @cached_property
    def on_meta_device(self) -> DiffusionBackbone:  # type: ignore[override]
        """See :attr:`StoredReward.on_meta_device`."""
        with torch.device("meta"):
            return self._backbone()

    def latent_space(self) -> LatentSpace:
        """See :meth:`StoredReward.latent_space`."""
        return self.on_meta_device.latent_space
