"""Pipelines of the shipped ones' configs with untrained networks, and saving of pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from latentreward.core.storage.durable import replacing
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline
from tools.pretraining.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
    from transformers import CLIPTokenizer

TRAINED = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""Parts of a pipeline that are trained, of which each pipeline has some."""


def build_pipeline(
    name: str, vae: AutoencoderKL, seed: int, words: tuple[str, ...] | None = None
) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """Build the pipeline ``name`` with the shipped configs, the trained ``vae``, and networks drawn by a seed.

    ``words`` are those of the tokenizer; the shipped one's if None.
    """
    pipeline, tokenizer = load_pipeline(PIPELINE_FOLDERS[name]), build_tokenizer(words)
    torch.manual_seed(seed)
    for part in TRAINED:
        if (network := getattr(pipeline, part, None)) is not None:
            build = getattr(network, "from_config", type(network))  # a model of diffusers or of transformers
            if part.startswith("text"):
                network.config.update(token_settings(tokenizer))
            pipeline.register_modules(**{part: build(network.config).eval()})
    tokenizers = {part: tokenizer for part in ("tokenizer", "tokenizer_2") if hasattr(pipeline, part)}
    pipeline.register_modules(vae=vae, **tokenizers)
    return pipeline


def token_settings(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Return what the config of a text encoder says of its tokens."""
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **ids}


def denoiser(pipeline: DiffusionPipeline) -> nn.Module:
    """Return the network of a pipeline that predicts noise or velocity."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in little space: text encoders in float32, autoencoder and denoiser in float16.

    transformers loads a model in the dtype it was saved in, and diffusers loads models in float32, so that a plain
    ``from_pretrained`` gives float32 throughout. Local paths that components were loaded from are removed from the
    configs. The folder is written atomically, and replaced if it exists. Autoencoder and denoiser of the float32
    ``pipeline`` are rounded to float16 in place and kept as float32.
    """
    halved = (pipeline.vae, denoiser(pipeline))
    for model in halved:
        model.to(torch.float16)
    with replacing(folder) as fresh:
        pipeline.save_pretrained(fresh)
        for path in (fresh / "model_index.json", *fresh.glob("*/*config.json")):
            config = json.loads(path.read_text())
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for model in halved:
        model.to(torch.float32)
