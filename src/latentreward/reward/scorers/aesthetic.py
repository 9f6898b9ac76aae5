"""Scorer by LAION's aesthetic predictor."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.reward.scorers.clip import CLIPImageScorer
from latentreward.reward.scoring.files import read_state_dict


class AestheticScorer(CLIPImageScorer):
    """LAION's aesthetic score of an image, about 1 to 10: linear layers on the normalised image embedding of CLIP-L.

    The layers are read from the weight file, which may hold any chain of linear layers. The published predictor has
    the widths 768-1024-128-64-16-1 and no activations; the older predictor with a single layer works too.

    Args:
        weights: Weight file of the predictor, e.g. ``sac+logos+ava1-l14-linearMSE.pth``, or a safetensors file.
        source: Folder or hub id of the ``CLIPModel`` that the predictor was trained on.
        name: Name of the scores in tables.
        options: See :class:`~latentreward.reward.scorers.clip.CLIPImageScorer`. ``dtype`` applies to CLIP; the
            predictor
            always computes in float32.
    """

    uses_prompt = False

    def __init__(
        self,
        weights: str | Path,
        source: PathText = "openai/clip-vit-large-patch14",
        *,
        name: str = "aesthetic",
        **options: Any,
    ) -> None:
        super().__init__(name, source, **options)
        self.weights = Path(weights)
        tensors = read_state_dict(self.weights, "the aesthetic predictor")
        self.layers = linear_chain(self.weights, tensors).to(self.device)

    def identity(self) -> str:
        weights = digest((parameter.detach().cpu().numpy().tobytes() for parameter in self.layers.parameters()), 8)
        return f"{super().identity()} weights {weights}"

    def prepare(self) -> None:
        """Load CLIP, and check that its embeddings have the width that the predictor takes."""
        expected, width = self.layers[0].in_features, self.towers().width
        if expected != width:
            raise InputError(
                f"weights of {self.name}: {self.weights} takes {expected} numbers, but {self.source} gives {width}; "
                f"give the CLIP model that the predictor was trained on"
            )

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        return self.layers(self.towers().embed_images(images)).squeeze(-1)


def linear_chain(path: Path, tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """Build a chain of linear layers from a state dict; error messages name its file ``path``.

    Tensors have the names ``layers.0.weight``, ``layers.0.bias``, ``layers.2.weight``, …, or ``weight`` and ``bias``
    for a single layer.
    """
    found = {name: re.fullmatch(r"(?:layers\.(\d+)\.)?weight", name) for name in tensors}
    order = sorted((int(match[1] or 0), name) for name, match in found.items() if match and tensors[name].ndim == 2)
    layers: list[nn.Linear] = []
    for _, name in order:
        weight, bias = tensors[name].float(), tensors.get(name.removesuffix("weight") + "bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        if bias is None or bias.shape != weight.shape[:1] or (layers and layers[-1].out_features != weight.shape[1]):
            raise InputError(f"{path}: {name} of shape {tuple(weight.shape)} does not follow the layer before it")
        layer.load_state_dict({"weight": weight, "bias": bias.float()}, assign=True)
        layers.append(layer)
    if not layers or layers[-1].out_features != 1 or len(tensors) != 2 * len(layers):
        raise InputError(f"{path}: no chain of linear layers with one output; give LAION's aesthetic predictor")
    return nn.Sequential(*layers).eval().requires_grad_(False)
