"""Pretrain tiny editors of drawn pictures: ``python -m tools.pretraining.editors kontext_tiny --output DIR``.

``kontext_tiny`` is shaped like FLUX.1-Kontext, and starts from random weights. ``ip2p_tiny`` is InstructPix2Pix, and
starts from the shipped ``sd_tiny``. Both have the shipped autoencoder. Each takes some minutes on one core. A folder
that holds the editor already is left alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    StableDiffusionInstructPix2PixPipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from latentreward.core.contracts import EditPrompt, sources_of
from latentreward.data import decode_image
from latentreward.diffusion import find_family
from latentreward.diffusion.encoders.prompts import CLIPPromptEncoder, PromptEncoder
from latentreward.diffusion.families.flux1 import Flux1PromptEncoder
from latentreward.diffusion.families.instruct_pix2pix import widened
from latentreward.tinyworld.datamodule import edit_prompts
from latentreward.tinyworld.edits import draw_edit, edit_splits, edited, judge_edit
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline, quiet_libraries
from latentreward.tinyworld.scenes import render
from tools.pretraining.networks import denoiser, save_pipeline
from tools.pretraining.pipelines import CAPTION_DROPOUT, stratified_uniform
from tools.pretraining.tokenizer import MAX_TOKENS, build_tokenizer
from tools.pretraining.training import TrainingRecipe, readme, train_averaged
from tools.pretraining.vae import encode_pictures

WIDTH = 64
"""Width of the text encoders of ``kontext_tiny``."""


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """Training settings of an editor. Updates are counted in steps."""

    seed: int = 0  # of pictures, initial weights, batches and noise
    sources_pictures: int = 2000  # scenes that are edited
    edits: int = 3  # edits of a scene, at most
    train_steps: int = 2000  # of network and text encoders
    lr: float = 1.5e-3  # peak learning rate
    batch_size: int = 16
    prompts: int = 120  # held-out edits that the editor is evaluated on


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with ``args``; None takes the arguments of the process."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretraining.editors", description=__doc__)
    parser.add_argument("name", choices=EDITORS)
    parser.add_argument("--output", type=Path, default=Path("runs/editors"), help="folder for the editor's folder")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on steps, pictures, prompts (quick trials)")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if not (options.output / options.name / "recipe.json").is_file():
        pretrain_editor(options.name, Recipe().scaled(options.scale), options.output / options.name)


def build_kontext() -> FluxKontextPipeline:
    """Build a pipeline shaped like FLUX.1-Kontext with the shipped autoencoder and random networks."""
    shipped, tokenizer = load_pipeline(PIPELINE_FOLDERS["sd_tiny"]), build_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shipped.vae,
        text_encoder=CLIPTextModel(shipped.text_encoder.config),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=4 * shipped.vae.config.latent_channels,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=shipped.text_encoder.config.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    )


def build_ip2p() -> StableDiffusionInstructPix2PixPipeline:
    """Build InstructPix2Pix from the shipped Stable Diffusion, whose U-Net gets the channels of the source."""
    parts = load_pipeline(PIPELINE_FOLDERS["sd_tiny"]).components
    parts = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler", "unet")}
    extra: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return StableDiffusionInstructPix2PixPipeline(
        **parts | {"unet": widened(parts["unet"])}, **extra, requires_safety_checker=False
    )


EDITORS: dict[str, Callable[[], Any]] = {"kontext_tiny": build_kontext, "ip2p_tiny": build_ip2p}
"""Function that builds each editor with untrained weights."""


def pretrain_editor(name: str, recipe: Recipe, folder: Path) -> None:
    """Train an editor on drawn edits of the training split, save it in ``folder``, and evaluate it."""
    torch.manual_seed(recipe.seed)
    pipeline = EDITORS[name]()
    pipeline.set_progress_bar_config(disable=True)
    encoder = prompt_encoder(pipeline)
    trained = nn.ModuleList([encoder, denoiser(pipeline)])
    losses = edit_losses(pipeline, encoder, recipe)
    trained.train()
    settings: dict[str, Any] = {"warmup": 100, "decay": 0.998, "weight_decay": 0.01, "fused": True}
    train_averaged(trained, losses, steps=recipe.train_steps, lr=recipe.lr, name=name, **settings)
    trained.eval()
    save_pipeline(pipeline, folder)
    prompts = edit_prompts("test", recipe.prompts, seed=0)
    figures = judge_editor(pipeline, prompts)
    print(f"{name}: {json.dumps(figures)}", flush=True)
    (folder / "recipe.json").write_text(json.dumps({"recipe": asdict(recipe), "figures": figures}, indent=1))
    shown = {figure: f"{value:.3f}" for figure, value in figures.items()}
    (folder / "README.md").write_text(readme(name, prompts=recipe.prompts, **shown))


def prompt_encoder(pipeline: DiffusionPipeline) -> PromptEncoder:
    """Return the prompt encoder of an editor's pipeline."""
    if hasattr(pipeline, "unet"):
        return CLIPPromptEncoder(pipeline.text_encoder, pipeline.tokenizer)
    encoders, tokenizer = (pipeline.text_encoder, pipeline.text_encoder_2), build_tokenizer()
    return Flux1PromptEncoder(*encoders, tokenizer, tokenizer, t5_length=MAX_TOKENS)


class LoadedPipeline:
    """Configs of a diffusers pipeline in memory, as a :class:`~latentreward.diffusion.PipelineConfigs`."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline = pipeline
        self.source = self.named = type(pipeline).__name__
        self.index: dict[str, Any] = {"_class_name": self.source, **pipeline.config}

    def has(self, part: str) -> bool:
        """Tell whether the pipeline has a part."""
        return getattr(self._pipeline, part, None) is not None

    def config(self, part: str) -> dict[str, Any]:
        """Return the config of a part."""
        loaded = getattr(self._pipeline, part)
        return {"_class_name": type(loaded).__name__, **loaded.config}

    def tensors(self, part: str, names: Sequence[str]) -> list[Tensor]:
        """Return tensors of a part by name."""
        state = getattr(self._pipeline, part).state_dict()
        return [state[name].detach().cpu() for name in names]


def edit_losses(pipeline: DiffusionPipeline, encoder: PromptEncoder, recipe: Recipe) -> Iterator[Tensor]:
    """Yield the mean squared error of the predicted noise or velocity of right results, batch by batch.

    A tenth of the prompts are empty. Of InstructPix2Pix, a tenth of the sources are zeros, half of them with an empty
    prompt, which its guidance needs.
    """
    family, network = find_family(LoadedPipeline(pipeline)), denoiser(pipeline)
    process, guidance = family.noise_process, family.default_guidance if family.flow else None
    rng = np.random.default_rng([recipe.seed, 9])
    sources, results, texts, owners = draw_training_edits(recipe, rng)
    with torch.no_grad():
        sources, results = (encode_pictures(pipeline.vae, pictures) for pictures in (sources, results))
    ids, empty = encoder.tokenize(texts), encoder.tokenize([""])
    while True:
        rows = torch.from_numpy(rng.integers(len(results), size=recipe.batch_size))
        chance = torch.from_numpy(rng.random(recipe.batch_size))
        tokens = (
            torch.where(chance[:, None] < CAPTION_DROPOUT, blank, given[rows])
            for given, blank in zip(ids, empty, strict=True)
        )
        source, clean = sources[owners[rows]], results[rows]
        if not family.flow:
            bare = (chance > CAPTION_DROPOUT / 2) & (chance < 1.5 * CAPTION_DROPOUT)
            source = torch.where(bare[:, None, None, None], 0.0, source)
        u, noise = stratified_uniform(len(rows)), torch.randn_like(clean)
        timesteps = 1000 * u if family.flow else (1000 * u).long()
        noisy = process.add_noise(clean, noise, timesteps)
        conditioning = replace(encoder.encode_ids(*tokens), source_latents=(source,))
        predicted = family.predict(network, noisy, timesteps, conditioning, guidance)
        yield (predicted - process.target(clean, noise, timesteps)).square().mean()


def draw_training_edits(recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """Draw scenes and edits of the training split.

    Returns:
        S sources and N right results ``(…, 3, 32, 32)``, uint8; N texts; the place ``(N,)`` of each one's source.
    """
    sources, results, texts, owners = list[np.ndarray](), list[np.ndarray](), list[str](), list[int]()
    training = [edit for part in edit_splits()["train"].values() for edit in part]
    for owner in range(recipe.sources_pictures):
        source, edit = draw_edit("train", rng)
        others = [other for other in training if other != edit and edited(source, other) is not None]
        chosen = [edit, *(others[place] for place in rng.permutation(len(others))[: recipe.edits - 1])]
        sources.append(render(source))
        for one in chosen:
            scene = edited(source, one)
            assert scene is not None
            results.append(render(scene))
            texts.append(one.text)
            owners.append(owner)
    given, made = (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) for arrays in (sources, results))
    return given, made, texts, torch.tensor(owners)


@torch.no_grad()
def judge_editor(pipeline: DiffusionPipeline, prompts: Sequence[EditPrompt], seed: int = 0) -> dict[str, float]:
    """Edit a picture for each prompt with diffusers in 20 steps; return the means of the judge's verdicts."""
    special: dict[str, Any] = {"image_guidance_scale": 1.5, "guidance_scale": 3.0}
    if hasattr(pipeline, "transformer"):
        special = {"height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False, "guidance_scale": 2.5}
        special |= {"max_sequence_length": MAX_TOKENS}
    verdicts = []
    for place, prompt in enumerate(prompts):
        source = decode_image(sources_of(prompt)[0])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        with quiet_libraries():
            made = pipeline(
                prompt=str(prompt), image=source, num_inference_steps=20, generator=generator, **special
            ).images[0]
        verdicts.append(judge_edit(source, made, prompt))
    return {
        name: float(np.mean([getattr(verdict, name) for verdict in verdicts]))
        for name in ("followed", "kept", "utility")
    }


if __name__ == "__main__":
    main()
