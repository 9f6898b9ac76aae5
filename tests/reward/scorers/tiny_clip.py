"""A CLIP model folder as published ones look, with tiny networks and random weights, and an aesthetic predictor."""

from itertools import pairwise
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

from tests.tiny_pipelines import clip_config, clip_tokenizer

WIDTH = 16
PIXELS = 32
WIDTHS = (WIDTH, 8, 6, 4, 2, 1)


def write_clip(folder: Path, width: int = WIDTH) -> str:
    """Save model, tokenizer and preprocessing; the same weights every time."""
    words = clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=PIXELS, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=clip_config(words).to_dict(), vision_config=vision.to_dict(), projection_dim=width
        )
        model = CLIPModel(config)
        for parameter in model.parameters():  # freshly initialised towers hardly tell one input from another
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder)
    return str(folder)


def write_aesthetic(path: Path) -> str:
    """The published layout: linear layers under numbers with gaps where dropout stands in training."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (first, second) in zip((0, 2, 4, 6, 7), pairwise(WIDTHS), strict=True):
        tensors[f"layers.{number}.weight"] = torch.randn(second, first, generator=generator)
        tensors[f"layers.{number}.bias"] = torch.randn(second, generator=generator)
    torch.save(tensors, path)
    return str(path)
