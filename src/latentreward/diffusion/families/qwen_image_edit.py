"""Qwen-Image-Edit and its releases 2509 and 2511, which take several pictures and show them to the text encoder too.

Conventions follow diffusers' ``QwenImageEditPipeline`` and ``QwenImageEditPlusPipeline``, but for one fault: with
transformers 5 they give the pictures' tokens the positions of text (in rows), not those in time, height and width with
which Qwen2.5-VL was trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latentreward.core.contracts import Conditioning, ImageRef, PathText, sources_of
from latentreward.core.errors import InputError, errors_at, quoted
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.encoders.vae import SourceSize, picture_sides, resized_picture
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.qwen_image import EDITORS, QwenImage, padded_rows, prefix_length, without_prefix

if TYPE_CHECKING:
    from transformers import Qwen2VLImageProcessorPil

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Text that is encoded for pictures and a prompt; the tokens before them are dropped afterwards."""
PAD = "<|image_pad|>"  # token in whose places the states of a picture come
LABEL = "Picture {}: "
READ_BY = "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"
PICTURE = "<|vision_start|>{}<|vision_end|>"
AREA = 1024 * 1024  # pixels of a picture that is encoded by the VAE, about
SEEN_AREA = 384 * 384  # pixels of a picture that the text encoder sees, in releases that number the pictures
MOST_ASPECT = 200  # ratio of a picture's sides that Qwen2.5-VL takes


class QwenImageEdit(QwenImage):
    """Family of Qwen-Image-Edit: as Qwen-Image, with sources that Qwen2.5-VL sees too.

    The first release takes one source. Later ones take several, which the prompt numbers; in the release 2511
    (``zero_cond_t``) the sources' tokens are modulated as at time 0.
    """

    name = "qwen_image_edit"
    title = "Qwen-Image-Edit"
    sees_sources = True

    @cached_property
    def sources(self) -> tuple[int, int | None]:  # type: ignore[override]
        """Smallest and largest number of pictures to edit."""
        return (1, None) if self.numbered else (1, 1)

    @property
    def numbered(self) -> bool:
        """Whether the pictures have numbers in the prompt, as in all releases but the first."""
        return bool(self.pipeline.index.get("_class_name") != EDITORS[0])

    @property
    def zero_time(self) -> bool:
        """Whether the sources' tokens are modulated as at time 0."""
        return self.entry(self.part, "zero_cond_t", bool, default=False)

    @property
    def model(self) -> str:
        return f"{self.title}{('-2511' if self.zero_time else '-2509') if self.numbered else ''}"

    def source_size(self, height: int, width: int) -> SourceSize:
        """See :meth:`Family.source_size`; an area of about 1024² pixels, the aspect kept to multiples of 32 pixels."""
        return SourceSize(sides(AREA, height, width))

    def check_prompt(self, prompt: str) -> None:
        self.seen.check(prompt)

    @cached_property
    def seen(self) -> SeenPictures:
        """Pictures as the text encoder sees them."""
        from transformers import Qwen2VLImageProcessorPil

        processor = self.pipeline.image_processor("processor", Qwen2VLImageProcessorPil)
        return SeenPictures(processor, len(self.tokenizer(LABEL.format(1)).input_ids) if self.numbered else None)

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import Qwen2_5_VLForConditionalGeneration

        whole = load(Qwen2_5_VLForConditionalGeneration, "text_encoder")
        return QwenImageEditPromptEncoder(whole.get_submodule("model"), self.tokenizer, self.seen)


def sides(area: float, height: int, width: int) -> tuple[int, int]:
    """Return the sides of about ``area`` pixels, multiples of 32, with the aspect of ``height`` and ``width``."""
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise InputError(
            f"a picture to edit has {width}×{height} pixels, and a side must be at most {MOST_ASPECT} times the other; "
            "crop the picture"
        )
    aspect = width / height
    columns = math.sqrt(area * aspect)
    return round(columns / aspect / 32) * 32, round(columns / 32) * 32


@dataclass(frozen=True)
class SeenPictures:
    """Pictures of prompts as Qwen2.5-VL sees them; without its weights, so that worker processes can check prompts."""

    processor: Qwen2VLImageProcessorPil  # its image processor
    # Number of tokens of a picture's number, before a picture that is seen with an area of 384² pixels; None where a
    # prompt has one picture, seen with 1024² pixels
    label_tokens: int | None

    @property
    def most_tokens(self) -> int:
        """Greatest number of tokens of a prompt; one picture takes about 200 or 1400 of them."""
        return 2048 if self.label_tokens is None else 1536

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the processor on which patches depend."""
        return {name: getattr(self.processor, name) for name in READ_BY} | {"size": dict(self.processor.size)}

    def check(self, prompt: str) -> None:
        """Check a prompt's pictures by their headers, and that its text has no token of a picture."""
        images, name = sources_of(prompt), f"the prompt {str(prompt)[:80]!r}"
        if self.label_tokens is None and len(images) > 1:
            raise InputError(
                f"{name} edits {len(images)} pictures, and Qwen-Image-Edit takes one; take a later release, such as "
                "Qwen-Image-Edit-2511"
            )
        tokens = [self.tokens(image) for image in images]
        if images and PAD in prompt:
            raise InputError(f"{name} holds {PAD}, the token of a picture; leave it out of the text")
        if sum(tokens) + len(images) * ((self.label_tokens or 0) + 2) > self.most_tokens + 1:  # no matter the last end
            raise InputError(
                f"{name} has {len(images)} pictures of {sum(tokens)} tokens, and all of it at most {self.most_tokens}; "
                "give fewer pictures"
            )

    def size(self, height: int, width: int) -> SourceSize:
        """Return the size in which the image processor gets a picture of (height, width) pixels."""
        return SourceSize(sides(AREA if self.label_tokens is None else SEEN_AREA, height, width))

    def tokens(self, image: ImageRef) -> int:
        """Return the number of tokens of a picture."""
        seen = picture_sides(image)
        with errors_at(f"image {quoted(repr(image.image_key))}: "):
            size = self.size(*seen)
        patches: int = self.processor.get_number_of_image_patches(*size.resized, {})  # transformers 5.6 takes no None
        return patches // self.processor.merge_size**2

    def patches(self, image: ImageRef) -> tuple[Tensor, list[int]]:
        """Return the patches ``(P, features)`` of a picture, and their numbers along time, height and width."""
        found = self.processor([resized_picture(image, self.size)], return_tensors="pt")
        return found["pixel_values"], found["image_grid_thw"][0].tolist()


class QwenImageEditPromptEncoder(PromptEncoder):
    """Prompt encoder of Qwen-Image-Edit: the states of Qwen2.5-VL for pictures and prompt, with a mask.

    A prompt's pictures come before its text, each as one token for every 28×28 pixels that Qwen2.5-VL sees of it. The
    text is cut where the prompt has over ``num_tokens``; pictures are not.
    """

    pooled_dim = 0
    masked = True
    sees_sources = True

    def __init__(self, text_encoder: Any, tokenizer: Any, seen: SeenPictures) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer, self.seen = text_encoder, tokenizer, seen
        self.token_dim = text_encoder.config.text_config.hidden_size
        self.num_tokens, self.picture_settings = seen.most_tokens, seen.settings
        self.dropped_tokens = prefix_length(tokenizer, TEMPLATE)
        self.picture_token = text_encoder.config.image_token_id

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """See :meth:`PromptEncoder.tokenize`; ids and mask of prompts in their template, padded at the end.

        For prompts with pictures also the patches ``(B, P, features)`` of their pictures one after another, and the
        numbers of patches along time, height and width ``(B, pictures, 3)``; zeros where a prompt has fewer.
        """
        ids, mask = padded_rows(self._rows(prompts), self.tokenizer.pad_token_id)
        if not any(sources_of(prompt) for prompt in prompts):
            return ids, mask
        with torch.device("cpu"):
            seen = [[self.seen.patches(image) for image in sources_of(prompt)] for prompt in prompts]
            features = 3 * self.seen.processor.temporal_patch_size * self.seen.processor.patch_size**2
            patches = [torch.cat([torch.zeros(0, features), *(one for one, _ in row)]) for row in seen]
            grids = [torch.tensor([grid for _, grid in row], dtype=torch.int64).reshape(-1, 3) for row in seen]
            return ids, mask, pad_sequence(patches, batch_first=True), pad_sequence(grids, batch_first=True)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        ids, mask, *seen = input_ids
        pictures: dict[str, Tensor] = {}
        if seen:
            patches, grids = seen
            used = torch.arange(patches.shape[1], device=ids.device) < grids.prod(dim=-1).sum(dim=-1, keepdim=True)
            pictures = {"pixel_values": patches[used], "image_grid_thw": grids[grids[..., 0] > 0]}
            # Without these the pictures' tokens would get the positions of text.
            pictures["mm_token_type_ids"] = (ids == self.picture_token).int()
        found = self.text_encoder(input_ids=ids, attention_mask=mask, use_cache=False, **pictures)
        return without_prefix(found.last_hidden_state, mask, self.dropped_tokens)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(row) - self.dropped_tokens for row in self._rows(prompts)]

    def _rows(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each prompt in its template, with one token for each 28×28 pixels of its pictures."""
        for prompt in prompts:
            self.seen.check(prompt)
        texts = []
        for prompt in prompts:
            pictures = [PICTURE.format(PAD * self.seen.tokens(source)) for source in sources_of(prompt)]
            if self.seen.label_tokens is None:
                pictures = pictures or [PICTURE.format(PAD)]
            else:
                pictures = [LABEL.format(number) + picture for number, picture in enumerate(pictures, start=1)]
            texts.append(TEMPLATE.format("".join(pictures) + prompt))
        rows, most = self.tokenizer(texts).input_ids, self.dropped_tokens + self.num_tokens
        self.tell_cut(self.tokenizer, texts, [len(row) for row in rows], most)
        return [row[:most] for row in rows]


@register_backbone
def qwen_image_edit(source: PathText, **options: Any) -> FamilyBackbone:
    """Load Qwen-Image-Edit, 2509 or 2511 (Apache-2.0): 60 blocks."""
    return load_family_backbone(source, "qwen_image_edit", **options)
