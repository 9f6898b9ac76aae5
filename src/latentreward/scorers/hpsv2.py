"""HPSv2 (arXiv:2306.09341), versions 2.0 and 2.1."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from latentreward.backbones.loading import check_tokenizer
from latentreward.devices import find_device
from latentreward.errors import InputError, first_line
from latentreward.scorers.base import ImageScorer
from latentreward.scorers.clip import PICKSCORE_PROCESSOR, CLIPTowers, Dtype, load_part
from latentreward.scorers.open_clip_weights import clip_model
from latentreward.scorers.weight_files import read_state_dict
from latentreward.storage.hub import hub_answers

REPOSITORY = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
HEADS = 16
"""Attention heads of both towers of a ViT-H-14."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pixels in [0, 1]."""


class HPSv2Scorer(ImageScorer):
    """HPSv2: the cosine of a fine-tuned ViT-H-14's embeddings, about 0.2 to 0.35.

    The weights are those of an OpenCLIP model. They run as a ``CLIPModel`` of transformers, to which they are converted
    exactly (tests/scorers/test_hpsv2.py compares with numbers of OpenCLIP itself). Prompts are tokenised by
    transformers' CLIP tokenizer, which differs from OpenCLIP's in HTML entities and broken Unicode alone.

    Args:
        weights: ``v2.0`` or ``v2.1`` for the published weights, from the hub; or their file.
        name: Name of its columns.
        scale: ``cosine``, as ``hpsv2.score`` returns, or ``percent``, 100 · cosine, as the tables of
            ``hpsv2.evaluate`` show.
        tokenizer: Folder or hub id of the CLIP tokenizer (transformers).
        dtype: Type of weights and pixels; the published code computes under autocast to float16.
        device: E.g. ``cuda:1``; ``auto`` takes the accelerator if there is one.
        batch_size: Images per call of the network.

    Raises:
        InputError: If a file is absent.

    Note:
        Images keep their aspect ratio: longest side to 224, bicubic with antialiasing in 8 bits, then centred on black,
        which is what ``hpsv2`` 1.2.0 does at inference (``resize_longest_max``), not the centre crop of other CLIP
        models. It leaves an oblong image whose longest side has 224 pixels unpadded and then fails; here it is padded.
    """

    def __init__(
        self,
        weights: str = "v2.1",
        *,
        name: str = "hpsv2",
        scale: Literal["cosine", "percent"] = "cosine",
        tokenizer: str = PICKSCORE_PROCESSOR,
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
        """Class, weights, tokenizer, type and scale."""
        size = f" {Path(self.weights).stat().st_size} bytes" if self.weights not in FILES else ""
        how = f"transformers tokenizer {self.tokenizer} {self.dtype} {self.scale}"
        return f"{type(self).__name__} {self.weights}{size} {how}"

    def prepare(self) -> None:
        """Load weights and tokenizer."""
        self._towers  # noqa: B018

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`."""
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
        return CLIPTowers(
            model, tokenizer, lambda images: torch.stack([padded_pixels(image, side) for image in images])
        )

    def _file(self) -> Path:
        if self.weights not in FILES:
            return Path(self.weights)
        from huggingface_hub import hf_hub_download

        try:
            offline = not hub_answers(REPOSITORY, FILES[self.weights])
            return Path(hf_hub_download(REPOSITORY, FILES[self.weights], local_files_only=offline))
        except (OSError, ValueError) as error:
            raise InputError(
                f"weights of {self.name}: cannot get {FILES[self.weights]} of {REPOSITORY} ({first_line(error)}); give "
                "its file"
            ) from error


def padded_pixels(image: Image.Image, side: int) -> Tensor:
    """``(3, side, side)`` float32 of an RGB image: longest side resized to ``side``, centred on black, normalised."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (side - width) // 2, (side - height) // 2
    padded = ImageOps.expand(image, (left, top, side - width - left, side - height - top))
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
