"""Tiny pipelines of Qwen-Image-Edit, in memory for diffusers and as a folder."""

import json
from atexit import register
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from latentreward.diffusion.families.qwen_image_edit import PAD, TEMPLATE
from tests.diffusion.families.made_qwen_image import scheduler, text_encoder, tokenizer, transformer
from tests.diffusion.families.made_wan21 import vae
from tests.tiny_pipelines import randomise

PICTURES = ("<|vision_start|>", "<|vision_end|>", PAD)


class Processor:
    """What ``Qwen2VLProcessor`` does, which needs torchvision: each picture's token is repeated in the text."""

    def __init__(self, words: Any, pictures: Qwen2VLImageProcessorPil) -> None:
        self.words, self.pictures = words, pictures

    def __call__(self, text: Sequence[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        found = self.pictures(images, return_tensors=return_tensors)
        counts, texts = iter(found["image_grid_thw"].prod(dim=-1) // 4), []
        for one in text:
            first, *others = one.split(PAD)
            texts.append(first + "".join(PAD * int(next(counts)) + other for other in others))
        return BatchFeature({**self.words(texts, padding=padding, return_tensors=return_tensors), **found})


def with_positions(model: torch.nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
    """Give pictures' tokens 3-D positions, as Qwen2.5-VL was trained; the pipelines leave them out."""
    return inputs, options | {"mm_token_type_ids": (options["input_ids"] == model.config.image_token_id).int()}


def qwen_image_edit(plus: bool = True, mended: bool = True, **network: Any) -> DiffusionPipeline:
    """A pipeline with random weights; ``mended`` gives it 3-D positions."""
    words = tokenizer(template=TEMPLATE, special=PICTURES)
    config = text_encoder(len(words)).config.to_dict()
    config["image_token_id"] = words.convert_tokens_to_ids(PAD)
    config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seeing = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
        kind = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
        pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
        parts = {"vae": vae(AutoencoderKLQwenImage), "transformer": transformer(**network), "text_encoder": seeing}
        for part in parts.values():
            randomise(part)
        pipeline = kind(scheduler=scheduler(), tokenizer=words, processor=Processor(words, pictures), **parts)
    pipeline.set_progress_bar_config(disable=True)
    if mended:
        seeing.register_forward_pre_hook(with_positions, with_kwargs=True)
    return pipeline


def write(pipeline: Any, folder: Path) -> str:
    """Write a pipeline as a folder, with the image processor's settings."""
    pipeline.save_pretrained(folder)
    pipeline.processor.pictures.save_pretrained(folder / "processor")
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor": ["transformers", "Qwen2VLProcessor"]}))
    return str(folder)


@cache
def qwen_image_edit_folder() -> str:
    """A folder of a release that numbers pictures; do not change it."""
    folder = Path(mkdtemp(prefix="qwen_image_edit_"))
    register(rmtree, folder, ignore_errors=True)
    return write(qwen_image_edit(), folder)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with a bright gradient and noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(height, width, 3, generator=generator) * 80
    ramp = torch.linspace(0, 175, width)[None, :, None] * torch.rand(3, generator=generator)
    return Image.fromarray((noise + ramp).byte().numpy())
