"""Scorer by HPSv2 (arXiv:2306.09341), versions 2.0 and 2.1."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, first_line
from latentreward.core.running import find_device
from latentreward.core.storage.hub import hub_answers
from latentreward.diffusion.backbones.loading import check_tokenizer
from latentreward.reward.scorers.base import ImageScorer
from latentreward.reward.scorers.clip import PICKSCORE_PROCESSOR, CLIPTowers, Dtype, load_part
from latentreward.reward.scorers.open_clip_weights import clip_model
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

    Raises:
        InputError: If ``weights`` is neither a version nor a file.

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
        """See :meth:`Scorer.identity`: class, weights, size of a weight file, tokenizer, dtype and scale."""
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
