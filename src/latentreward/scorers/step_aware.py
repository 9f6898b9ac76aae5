"""SPO's step-aware preference model as a scorer of images, and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from latentreward.errors import InputError
from latentreward.scorers.clip import (
    PICKSCORE,
    CLIPImageScorer,
    default_processor,
    load_clip,
    model_source,
)
from latentreward.scorers.weight_files import read_state_dict

if TYPE_CHECKING:
    from latentreward.scorers.step_aware_clip import StepAwareCLIP


class StepAwareScorer(CLIPImageScorer):
    """SPO's step-aware preference model (arXiv:2406.04314): scores what a policy predicts at a timestep.

    Use it as the scorer of a ``PixelReward``. On images alone, as any other scorer, it takes them as finished.

    Args:
        source: Folder or hub id of the CLIP model that it started from, or ``spm_tiny``, the tiny world's.
        weights: What training changed: checkpoint of ``StepAwarePixelModule``, or the file that SPO released. Not
            needed if ``source`` is a folder with ``step_aware.safetensors``.
        name: Name of its columns.
        options: See :class:`~latentreward.scorers.clip.CLIPImageScorer`. A ``PixelReward`` computes where the policy
            is, whatever ``device`` says.
    """

    def __init__(
        self, source: str = PICKSCORE, *, weights: str | None = None, name: str = "step_aware", **options: Any
    ) -> None:
        super().__init__(name, source, **options)
        self.weights = weights
        if weights is not None and not Path(weights).is_file():
            raise InputError(f"weights of {name}: no file {weights}")

    def identity(self) -> str:
        """Class, model, type and weights."""
        return f"{super().identity()} weights {self.weights}"

    def load(self) -> StepAwareCLIP:
        """The network, frozen, on the CPU.

        Raises:
            InputError: If its weights cannot be loaded, or are those of a CLIP model without timestep.
        """
        network, trained = load_step_aware(self.source, self.processor, self.revision, self.weights)
        if not (trained or network.mean.is_meta):  # which has shapes alone
            raise InputError(
                f"source {self.source!r} of {self.name} is a CLIP model that knows no timestep; train one with "
                "configs/model/spm_sd15.yaml, and give its checkpoint as weights"
            )
        return network.to(getattr(torch, self.dtype)).eval().requires_grad_(False)

    def prepare(self) -> None:
        """Load the network."""
        self._network  # noqa: B018

    @cached_property
    def _network(self) -> StepAwareCLIP:
        return self.load().to(self.device)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`; images count as finished."""
        network, finished = self._network, torch.zeros(1, device=self.device)
        embeds = torch.cat([network.embed_images(to_pixels(image).to(self.device), finished) for image in images])
        return network.similarity(embeds, network.embed_tokens(network.tokenize(prompts)))


def to_pixels(image: Image.Image) -> Tensor:
    """Pixels ``(1, 3, H, W)`` float32 in [-1, 1]."""
    rgb = image.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(1, rgb.height, rgb.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def load_step_aware(
    source: str, processor: str | None = None, revision: str | None = None, weights: str | None = None
) -> tuple[StepAwareCLIP, bool]:
    """A step-aware CLIP in float32, without gradients.

    Args:
        source: Folder or hub id of a CLIP model, or the name of a shipped one.
        processor: Folder or hub id of tokenizer and preprocessing.
        revision: Branch, tag or commit of a hub id.
        weights: Checkpoint over it.

    Returns:
        The network, and whether it was trained to know the timestep; if not, its timestep changes nothing.

    Raises:
        InputError: If a part cannot be loaded, or weights are of another network.
    """
    from latentreward.scorers.step_aware_clip import STEP_FILE, StepAwareCLIP

    folder, processor = model_source(source), model_source(processor or default_processor(source))
    clip, tokenizer, preprocess = load_clip(folder, processor, revision, torch.float32)
    network = StepAwareCLIP(clip, tokenizer, preprocess.image_mean, preprocess.image_std)
    beside = Path(folder) / STEP_FILE
    file = beside if weights is None else Path(weights)
    if weights is None and not beside.is_file():
        return network.requires_grad_(False), False
    put_weights(network, read_tensors(file), file)
    return network.requires_grad_(False), True


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, of a checkpoint of ``StepAwarePixelModule``, or of the file that SPO released.

    Raises:
        InputError: If the file cannot be read, or holds more than tensors.
    """
    from latentreward.scorers.step_aware_clip import rename_published

    tensors, prefix = read_state_dict(path, "a step-aware model"), "network."
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return own or (tensors if path.suffix == ".safetensors" else rename_published(tensors))


def put_weights(network: StepAwareCLIP, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load ``tensors`` into ``network``; those of the CLIP model may be missing and stay.

    Raises:
        InputError: If they do not fit.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in tensors and not name.startswith("clip.")]
    unknown = [name for name in tensors if name not in own]
    other = [name for name, value in tensors.items() if name in own and value.shape != own[name].shape]
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("has another shape of", other)):
        if names:
            raise InputError(
                f"weights: {path} {problem} tensor {names[0]} ({len(names)} in all); give the checkpoint of a "
                "step-aware model that started from this source"
            )
    network.load_state_dict(dict(tensors), strict=False)
