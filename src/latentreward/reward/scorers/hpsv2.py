"""Scorer by HPSv2 (arXiv:2306.09341), versions 2.0 and 2.1, whose OpenCLIP weights become a ``CLIPModel``."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, first_line, one_line
from latentreward.core.running import find_device
from latentreward.core.storage.hub import hub_answers
from latentreward.diffusion.backbones.loading import check_tokenizer
from latentreward.reward.scorers.base import ImageScorer
from latentreward.reward.scorers.clip import PICKSCORE_PROCESSOR, CLIPTowers, Dtype, load_part
from latentreward.reward.scoring.files import read_state_dict

REPOSITORY = "xswu/HPSv2"  # hub id of the published weights
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}  # version → file name in REPOSITORY
HEADS = 16  # attention heads of both towers of a ViT-H-14
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation per channel in CLIP's preprocessing, for pixels in [0, 1]."""


class HPSv2Scorer(ImageScorer):
    """HPSv2: the cosine of image and prompt embeddings of a fine-tuned ViT-H-14, about 0.2 to 0.35.

    The published OpenCLIP weights are converted exactly to a ``CLIPModel`` of transformers
    (tests/reward/scorers/test_hpsv2.py compares with scores of OpenCLIP itself). Prompts are tokenised by transformers'
    CLIP tokenizer, which differs from OpenCLIP's only for HTML entities and broken Unicode.

    Args:
        weights: ``v2.0`` or ``v2.1`` for the published weights from the hub, or the path of a weight file.
        name: Name of the scores in tables.
        scale: ``cosine``, as ``hpsv2.score`` returns, or ``percent``, 100 · cosine, as in the tables of
            ``hpsv2.evaluate``.
        tokenizer: Folder or hub id of the CLIP tokenizer (transformers).
        dtype: Dtype of weights and pixels; the published code computes under autocast to float16.
        device: Device such as ``cuda:1``; ``auto`` takes the accelerator if there is one.
        batch_size: Images per forward pass.

    Note:
        Images keep their aspect ratio, as in ``hpsv2`` 1.2.0 at inference (``resize_longest_max``): the longest side is
        resized to 224 pixels, bicubic with antialiasing in 8 bits, and the rest is padded with black. Other CLIP models
        use a centre crop. Unlike ``hpsv2`` 1.2.0, which fails on an oblong image whose longest side already has 224
        pixels, this class pads such an image too.
    """

    def __init__(
        self,
        weights: PathText = "v2.1",
        *,
        name: str = "hpsv2",
        scale: Literal["cosine", "percent"] = "cosine",
        tokenizer: PathText = PICKSCORE_PROCESSOR,
        dtype: Dtype = "float32",
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        super().__init__(name, batch_size)
        if weights not in FILES and not Path(weights).is_file():
            raise InputError(f"weights of {name}: {weights!r} is neither v2.0, v2.1 nor a file; give one of these")
        self.weights, self.scale, self.tokenizer = weights, scale, tokenizer
        self.dtype, self.device = dtype, find_device(device)

    def identity(self) -> str:
        size = f" {Path(self.weights).stat().st_size} bytes" if self.weights not in FILES else ""
        how = f"transformers tokenizer {self.tokenizer} {self.dtype} {self.scale}"
        return f"{type(self).__name__} {self.weights}{size} {how}"

    def prepare(self) -> None:
        """Load weights and tokenizer."""
        self._towers  # noqa: B018

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        cosine = self._towers.cosine(prompts, images)
        return cosine if self.scale == "cosine" else 100 * cosine

    @cached_property
    def _towers(self) -> CLIPTowers:
        from transformers import CLIPTokenizer

        tensors = read_state_dict(self._file(), "HPSv2")
        model = clip_model(tensors, self.weights, HEADS, getattr(torch, self.dtype)).to(self.device)
        tokenizer = load_part(CLIPTokenizer, self.tokenizer, None)
        rows = model.config.text_config.vocab_size
        check_tokenizer(tokenizer, rows, f"tokenizer of {self.name}", "give CLIP's tokenizer")
        side = model.config.vision_config.image_size
        return CLIPTowers(model, tokenizer, lambda images: torch.stack([padded_pixels(one, side) for one in images]))

    def _file(self) -> Path:
        if self.weights not in FILES:
            return Path(self.weights)
        from huggingface_hub import hf_hub_download

        try:
            offline = not hub_answers(REPOSITORY, FILES[self.weights])
            return Path(hf_hub_download(REPOSITORY, FILES[self.weights], local_files_only=offline))
        except (OSError, ValueError) as error:
            lacking = f"cannot get {FILES[self.weights]} of {REPOSITORY} ({first_line(error)})"
            raise InputError(f"weights of {self.name}: {lacking}; give its file") from error


def padded_pixels(image: Image.Image, side: int) -> Tensor:
    """Resize an RGB image's longest side to ``side``, pad with black, and normalise: ``(3, side, side)`` float32."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (side - width) // 2, (side - height) // 2
    padded = ImageOps.expand(image, (left, top, side - width - left, side - height - top))
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.attn\.in_proj_", ".self_attn.qkv_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
)
"""Patterns of parts of OpenCLIP's names, and what stands in their place in transformers'."""
UNUSED = ("attn_mask", "logit_bias")  # a buffer in old files, and a parameter that only SigLIP uses


def clip_model(tensors: Mapping[str, Tensor], origin: str, heads: int, dtype: torch.dtype) -> Any:
    """Build a ``CLIPModel`` from OpenCLIP weights, in evaluation mode and without gradients.

    All sizes but the number of heads, equal in both towers, are read from the weights. The conversion is exact for
    OpenCLIP models with GELU (not QuickGELU), a class token, and text pooled at the end token.
    """
    from transformers import CLIPModel

    try:
        converted = _renamed(tensors)
        with torch.device("meta"):
            model = CLIPModel(_config(converted, heads))
        model.load_state_dict({name: value.to(dtype) for name, value in converted.items()}, assign=True)
    except (LookupError, ValueError, RuntimeError) as error:
        reason = one_line(error)[:200]
        raise InputError(f"weights: {origin} are not those of an OpenCLIP model with a ViT ({reason})") from error
    for tower in (model.text_model, model.vision_model):  # buffers that no state dict holds and that are still meta
        positions = tower.embeddings.position_embedding.weight
        tower.embeddings.position_ids = torch.arange(len(positions), device=positions.device).expand(1, -1)
    return model.eval().requires_grad_(False)


def _config(tensors: Mapping[str, Tensor], heads: int) -> Any:
    """Read the sizes from weights with transformers' names."""
    from transformers import CLIPConfig

    width, towers = len(tensors["visual_projection.weight"]), dict[str, dict[str, Any]]()
    for tower in ("text", "vision"):
        biases = [name for name in tensors if name.startswith(f"{tower}_model.") and name.endswith(".mlp.fc1.bias")]
        towers[tower] = {
            "hidden_size": tensors[f"{tower}_model.embeddings.position_embedding.weight"].shape[1],
            "intermediate_size": len(tensors[biases[0]]),
            "num_hidden_layers": len(biases),
            "num_attention_heads": heads,
            "hidden_act": "gelu",
            "projection_dim": width,
        }
    words = tensors["text_model.embeddings.token_embedding.weight"]
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    positions = len(tensors["text_model.embeddings.position_embedding.weight"])
    # OpenCLIP pools at the largest id.
    ids = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    grid = round((len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    pixels = {"patch_size": patch.shape[-1], "image_size": grid * patch.shape[-1]}
    text = towers["text"] | ids | {"max_position_embeddings": positions}
    return CLIPConfig(text_config=text, vision_config=towers["vision"] | pixels, projection_dim=width)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights the names of transformers, split attention's three matrices, and transpose the projections."""
    converted: dict[str, Tensor] = {}
    for name in tensors.keys() - UNUSED:
        value = tensors[name].T.contiguous() if name in ("visual.proj", "text_projection") else tensors[name]
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)  # noqa: PLW2901
        if "qkv_proj" not in name:
            converted[name] = value
            continue
        for part, tensor in zip("qkv", value.chunk(3), strict=True):
            converted[name.replace("qkv", part)] = tensor.clone()
    return converted
