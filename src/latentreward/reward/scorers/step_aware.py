"""Scorer by SPO's step-aware preference model, and loading of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.data.images import to_pixels
from latentreward.reward.scorers.clip import PICKSCORE, CLIPImageScorer, default_processor, load_clip, model_source
from latentreward.reward.scoring.files import load_exactly, read_state_dict

if TYPE_CHECKING:
    from latentreward.reward.scorers.step_aware_clip import StepAwareCLIP


class StepAwareScorer(CLIPImageScorer):
    """SPO's step-aware preference model (arXiv:2406.04314), a CLIP model that also gets the timestep.

    As the scorer of a ``PixelReward`` the model scores the image that a policy predicts at a timestep. As a scorer of
    images the model gets timestep 0, which stands for finished images.

    Args:
        source: Folder or hub id of the CLIP model that training started from, or ``spm_tiny``, a tiny trained model
            shipped with the package.
        weights: Trained weights: a checkpoint of ``StepAwarePixelModule``, or the file that SPO released. Not needed if
            ``source`` is a folder with ``step_aware.safetensors``.
        name: Name of the scores in tables.
        options: See :class:`~latentreward.reward.scorers.clip.CLIPImageScorer`. A ``PixelReward`` ignores ``device``
            and uses the device of the policy.
    """

    def __init__(
        self, source: PathText = PICKSCORE, *, weights: PathText | None = None, name: str = "step_aware", **options: Any
    ) -> None:
        super().__init__(name, source, **options)
        self.weights = weights
        if weights is not None and not Path(weights).is_file():
            raise InputError(f"weights of {name}: no file {weights}; give a checkpoint, or the file that SPO released")

    def identity(self) -> str:
        return f"{super().identity()} weights {self.weights}"

    def load(self) -> StepAwareCLIP:
        """Load the network, frozen, on the CPU."""
        network, trained = load_step_aware(self.source, self.processor, self.revision, self.weights)
        if not (trained or network.mean.is_meta):  # which has shapes alone
            remedy = "train one with configs/model/spm_sd15.yaml, and give its checkpoint as weights"
            raise InputError(f"source {self.source!r} of {self.name} is a CLIP model that knows no timestep; {remedy}")
        return network.to(getattr(torch, self.dtype)).eval().requires_grad_(False)

    def prepare(self) -> None:
        """Load the network."""
        self._network  # noqa: B018

    @cached_property
    def _network(self) -> StepAwareCLIP:
        return self.load().to(self.device)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        network, finished = self._network, torch.zeros(1, device=self.device)
        pixels = (to_pixels(image.convert("RGB"))[None].to(self.device) for image in images)
        embeds = torch.cat([network.embed_images(one, finished) for one in pixels])
        return network.similarity(embeds, network.embed_tokens(network.tokenize(prompts)))


def load_step_aware(
    source: str, processor: str | None = None, revision: str | None = None, weights: str | None = None
) -> tuple[StepAwareCLIP, bool]:
    """Load a step-aware CLIP model in float32, without gradients; under ``torch.device("meta")`` only its shapes.

    The file ``weights`` is loaded over the weights of ``source``: a checkpoint of ``StepAwarePixelModule``, the file
    that SPO released, or safetensors. Weights of CLIP that it lacks stay as they are. None takes
    ``step_aware.safetensors`` in the folder ``source``, if there is one.

    Returns:
        The network, and whether trained weights were loaded. Without them the timestep does not change the embeddings.
    """
    from latentreward.reward.scorers.step_aware_clip import STEP_FILE, StepAwareCLIP, rename_published

    folder, processor = model_source(source), model_source(processor or default_processor(source))
    clip, tokenizer, preprocess = load_clip(folder, processor, revision, torch.float32)
    network = StepAwareCLIP(clip, tokenizer, preprocess.image_mean, preprocess.image_std)
    beside = Path(folder) / STEP_FILE
    file = beside if weights is None else Path(weights)
    if network.mean.is_meta or (weights is None and not beside.is_file()):
        return network.requires_grad_(False), False
    tensors, prefix = read_state_dict(file, "a step-aware model"), "network."
    trained = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not trained:  # not a checkpoint of StepAwarePixelModule
        trained = tensors if file.suffix == ".safetensors" else rename_published(tensors)
    of_source = tuple(name for name in network.state_dict() if name.startswith("clip."))
    try:
        load_exactly(network, trained, file, absent_by_design=of_source)
    except InputError as error:
        raise InputError(f"{error}; give weights of a step-aware model that started from this source") from error
    return network.requires_grad_(False), True
