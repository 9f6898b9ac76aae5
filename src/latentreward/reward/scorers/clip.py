"""Scorers by CLIP models: cosine similarity, CLIP score, PickScore, and LAION's aesthetic predictor."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, errors_at, first_line
from latentreward.core.running import find_device
from latentreward.core.storage.digests import digest
from latentreward.core.storage.hub import read_locally
from latentreward.diffusion.backbones.loading import check_tokenizer, load_weights
from latentreward.reward.scorers.base import ImageScorer
from latentreward.reward.scoring.files import read_state_dict

Dtype = Literal["float32", "float16", "bfloat16"]
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Hub id of PickScore's model, and of its tokenizer and preprocessing."""
SHIPPED = ("held_out_tiny", "spm_tiny")  # names of the tiny CLIP models that the package ships for tests and demos


def model_source(source: str) -> str:
    """Return the folder of a shipped model if ``source`` is its name, else ``source`` itself."""
    return str(files("latentreward.tinyworld") / "scorers" / source) if source in SHIPPED else source


def default_processor(source: str) -> str:
    """Return the folder or hub id with the tokenizer and preprocessing of the CLIP model ``source``."""
    return PICKSCORE_PROCESSOR if source == PICKSCORE else source


class CLIPTowers:
    """A ``CLIPModel`` without gradients; ``pixels`` converts B images to its input ``(B, 3, H, W)``, float32."""

    def __init__(self, model: Any, tokenizer: Any, pixels: Callable[[Sequence[Image.Image]], Tensor]) -> None:
        self.model, self.tokenizer, self.pixels = model, tokenizer, pixels

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return embeddings ``(B, width)`` of B images, float32, of norm 1."""
        pixels = self.pixels(images).to(self.model.device, self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings ``(B, width)`` of B prompts, float32, of norm 1; long prompts are truncated."""
        distinct = list(dict.fromkeys(prompts))
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(distinct, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        embeds = normalize(self.model.text_projection(pooled).float(), dim=-1)
        return embeds[[distinct.index(prompt) for prompt in prompts]]

    def cosine(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """Return the cosine similarity ``(B,)`` of each image's embedding with its prompt's, float32."""
        return (self.embed_images(images) * self.embed_prompts(prompts)).sum(dim=-1)


class CLIPImageScorer(ImageScorer):
    """Base class of scorers on a CLIP model. Weights are loaded by :meth:`prepare` only.

    Args:
        name: See :class:`~latentreward.reward.Scorer`.
        source: Folder or hub id of a ``CLIPModel``, or ``held_out_tiny``, a tiny model shipped with the package.
        processor: Folder or hub id of tokenizer and preprocessing. None takes those of OpenCLIP's ViT-H for PickScore's
            model, otherwise ``source``.
        revision: Branch, tag or commit of a hub id; give a commit to get the same scores later.
        dtype: Dtype of weights and pixels.
        device: Device such as ``cuda:1``; ``auto`` takes the accelerator if there is one.
        batch_size: Images per forward pass.
    """

    def __init__(
        self,
        name: str,
        source: PathText,
        processor: PathText | None = None,
        revision: str | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        super().__init__(name, batch_size)
        self.source, self.processor = source, processor or default_processor(source)
        self.revision, self.dtype, self.device = revision, dtype, find_device(device)

    def identity(self) -> str:
        sources = self.source if self.processor == self.source else f"{self.source} processor {self.processor}"
        return f"{type(self).__name__} {sources} revision {self.revision} {self.dtype}"

    def prepare(self) -> None:
        """Load model, tokenizer and preprocessing."""
        self.towers()

    def towers(self) -> CLIPTowers:
        """Return the loaded model, which scorers with the same settings share."""
        source, processor = model_source(self.source), model_source(self.processor)
        return load_towers(source, processor, self.revision, self.dtype, self.device)


class CLIPScorer(CLIPImageScorer):
    """CLIP similarity of image and prompt: the cosine of their embeddings.

    Args:
        source: Folder or hub id of a ``CLIPModel``, or ``held_out_tiny``, a tiny model shipped with the package.
        name: Name of the scores in tables.
        scale: ``cosine``, the unit in which the thresholds of MPCF (multi-preference consistent filtering) are given,
            or ``clip_score``, 100 · max(cosine, 0).
        options: See :class:`CLIPImageScorer`.
    """

    def __init__(
        self,
        source: PathText = "openai/clip-vit-large-patch14",
        *,
        name: str = "clipscore",
        scale: Literal["cosine", "clip_score"] = "cosine",
        **options: Any,
    ) -> None:
        super().__init__(name, source, **options)
        self.scale = scale

    def identity(self) -> str:
        return f"{super().identity()} {self.scale}"

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        cosine = self.towers().cosine(prompts, images)
        return cosine if self.scale == "cosine" else 100 * cosine.clamp(min=0)


class PickScorer(CLIPImageScorer):
    """PickScore (arXiv:2305.01569): ``exp(logit_scale) · cos(text, image)``, about 20 to 23 for the published model.

    Args:
        source: Folder or hub id of the model, or ``held_out_tiny``, a tiny model shipped with the package.
        name: Name of the scores in tables.
        options: See :class:`CLIPImageScorer`.
    """

    def __init__(self, source: PathText = PICKSCORE, *, name: str = "pickscore", **options: Any) -> None:
        super().__init__(name, source, **options)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        towers = self.towers()
        return float(towers.model.logit_scale.float().exp()) * towers.cosine(prompts, images)


@cache
def load_towers(source: str, processor: str, revision: str | None, dtype: Dtype, device: torch.device) -> CLIPTowers:
    """Load a CLIP model, once per process for equal arguments.

    Images are preprocessed with PIL by transformers, as the published models were used: shortest edge resized, bicubic
    with antialiasing in 8 bits; centre crop; mean and standard deviation of ``preprocessor_config.json``.
    """
    model, tokenizer, preprocess = load_clip(source, processor, revision, getattr(torch, dtype))

    def pixels(images: Sequence[Image.Image]) -> Tensor:
        return preprocess([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    return CLIPTowers(model.to(device), tokenizer, pixels)


def load_part(family: Any, source: str, revision: str | None) -> Any:
    """Load a tokenizer or preprocessing, of transformers' class ``family``."""
    try:
        return family.from_pretrained(source, revision=revision, local_files_only=read_locally(source, revision))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {family.__name__} of {source!r}: {first_line(error)}") from error


def load_clip(source: str, processor: str, revision: str | None, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Load a ``CLIPModel`` without gradients, its tokenizer and its image preprocessing, from folders or hub ids.

    ``revision`` is that of ``source``, and also of ``processor`` if both are the same.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    options = {"revision": revision, "local_files_only": read_locally(source, revision)}
    with errors_at(f"source={source!r}: "):
        model = load_weights(CLIPModel, source, refused=("missing", "mismatched"), torch_dtype=dtype, **options)
    same = revision if processor == source else None
    tokenizer, preprocess = (load_part(family, processor, same) for family in (CLIPTokenizer, CLIPImageProcessorPil))
    remedy = "get its files again, or set processor to where the model's tokenizer lies"
    check_tokenizer(tokenizer, model.config.text_config.vocab_size, f"processor={processor!r}: the tokenizer", remedy)
    return model.eval().requires_grad_(False), tokenizer, preprocess


class AestheticScorer(CLIPImageScorer):
    """LAION's aesthetic score of an image, about 1 to 10: linear layers on the normalised image embedding of CLIP-L.

    The layers are read from the weight file, which may hold any chain of linear layers. The published predictor has
    the widths 768-1024-128-64-16-1 and no activations; the older predictor with a single layer works too.

    Args:
        weights: Weight file of the predictor, e.g. ``sac+logos+ava1-l14-linearMSE.pth``, or a safetensors file.
        source: Folder or hub id of the ``CLIPModel`` that the predictor was trained on.
        name: Name of the scores in tables.
        options: See :class:`CLIPImageScorer`. ``dtype`` applies to CLIP; the predictor always computes in float32.
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
