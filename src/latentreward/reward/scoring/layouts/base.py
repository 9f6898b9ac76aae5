"""Base class of the layouts in which a trained reward model lies on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from latentreward.core.checkpoints.base_weights import same_values, sample
from latentreward.core.contracts import LatentSpace, taken_of_edits
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.reward.heads.base import AXES, RewardHead
from latentreward.reward.scoring.layouts.recipe import ModelRecipe
from latentreward.reward.scoring.network import RewardNetwork

Network = TypeVar("Network", bound=RewardNetwork)


class StoredReward(ABC):
    """Trained reward model on disk: a recipe of its parts, and the files with their weights.

    Constructing an object reads only small files. In alignment, a reward that was trained as a LoRA adapter on the
    policy's base can run on the policy's own network. :attr:`on_meta_device`, :meth:`same_base`, :meth:`head` and
    :meth:`adapter` serve that case: they tell whether the reward fits the policy, and load the reward's head and
    adapter without its base.
    """

    recipe: ModelRecipe | None = None  # None in a published layout, where the weights decide on some settings
    exif: ExifOrientation = "ignore"  # as in training; ``ignore`` in the published layouts
    image_sizes: ImageSizes | None = None  # as in training; None if not recorded, as in the published layouts
    edits: bool | None = None  # whether the pairs of the training were edits of pictures; None if not recorded
    shareable: bool = True  # whether the model may run on a policy's network, as an adapter can

    @abstractmethod
    def load(self, kind: type[Network]) -> Network:
        """Load the whole model as an object of the class ``kind``, frozen and in evaluation mode."""

    @abstractmethod
    def backbone(self) -> DiffusionBackbone:
        """Build the backbone with initialised adapters; under ``torch.device("meta")`` it has shapes but no weights."""

    @abstractmethod
    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        """Load only the trained head, built for the features of ``backbone``, which may be :attr:`on_meta_device`."""

    @cached_property
    def on_meta_device(self) -> DiffusionBackbone:
        """Backbone on the meta device, which has shapes but no weights."""
        with torch.device("meta"):
            return self.backbone()

    def latent_space(self) -> LatentSpace:
        """Return the latent space of the latents that the model scores, from config files alone."""
        return self.on_meta_device.latent_space

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the two outputs of a head with axes, from its settings; empty for a head with one score."""
        return AXES if self.recipe is not None and self.recipe.head.init_args.get("axes") else ()

    def sources(self, backbone: DiffusionBackbone) -> tuple[int, int | None]:
        """Return how many pictures to edit the model takes: as many as its ``backbone``, if its training had some."""
        return taken_of_edits(backbone.sources, lambda: self.edits)

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        """Read only the trained LoRA tensors of the network of ``backbone``, by their names in it."""
        return {}

    def base_values(self) -> Mapping[str, Tensor]:
        """Read a few values of each weight as in training, by its name in the backbone without adapters.

        The result is empty if no values were recorded.
        """
        return {}

    def same_base(self, part: str, weights: Mapping[str, Tensor], source: str) -> bool:
        """Tell whether the model was trained on the given pretrained weights, from :meth:`base_values`.

        ``weights`` are by their names, without adapters, in ``part`` of the backbone: ``text_encoder``, or the
        ``network_name`` of :attr:`on_meta_device`. The published DiNa-LRM layout, which records no values, compares
        ``source``, their folder or hub id, instead.
        """
        theirs, ours = self.base_values(), {f"{part}.{name}": weight for name, weight in weights.items()}
        return all(name in theirs and same_values(sample(weight), theirs[name]) for name, weight in ours.items())

    def complete_from(self, pipeline: PipelineSource) -> None:
        """Take tokenizers that the files lack from the ``pipeline`` of the policy, unless a base is given."""
        return

    def finished(self, model: Network, recipe: ModelRecipe | None) -> Network:
        """Give a loaded model its recipe and the settings that its files record, and freeze it."""
        model.recipe, model.exif, model.edits = recipe, self.exif, self.edits
        model.backbone.sources = self.sources(model.backbone)
        model.image_sizes = self.image_sizes or model.image_sizes
        return model.requires_grad_(False).eval()
