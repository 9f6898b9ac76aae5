"""Pretrain the two tiny pipelines from scratch: ``python -m tools.pretraining.pipelines --output DIR``.

First, the common autoencoder is trained on two threads. Then the two denoisers are trained in parallel, each in a
process with one thread, which is faster than in sequence on two threads. It takes less than an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from latentreward.tinyworld.captions import held_out_captions
from latentreward.tinyworld.oracle import mean_verdict
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline, sample_pictures
from latentreward.tinyworld.tokenizer import tokenize
from tools.pretraining.denoiser import train_denoiser
from tools.pretraining.networks import build_sd, build_sd35, save_pipeline
from tools.pretraining.recipes import TrainingRecipe, readme
from tools.pretraining.vae import draw_training_pictures, encode_pictures, train_vae

PIPELINES = {"sd_tiny": build_sd, "sd35_tiny": build_sd35}


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """Training settings of the shipped pipelines.

    Attributes:
        seed: Seed of pictures, initial weights, batches and noise.
        vae_pictures: Number of training pictures of the autoencoder, 60 % of them without nuisances.
        pictures: Number of training pictures of the denoisers, 60 % of them without nuisances.
        vae_steps: Updates of the autoencoder.
        decoder_steps: Further updates of the autoencoder's decoder alone.
        sd_tiny_steps: Updates of the U-Net and its text encoder.
        sd35_tiny_steps: Updates of the transformer and its text encoders.
        lr: Peak learning rate of the denoisers.
        finishing_pictures: Number of training pictures of a last phase for higher quality, 80 % of them without
            nuisances.
        finishing_steps: Updates of each denoiser in the last phase.
        finishing_lr: Peak learning rate of the last phase.
        batch_size: Pictures per update of a denoiser.
        prompts: Number of held-out captions that the pipelines are evaluated on.
    """

    seed: int = 0
    vae_pictures: int = 24_000
    pictures: int = 48_000
    vae_steps: int = 3000
    decoder_steps: int = 2000
    sd_tiny_steps: int = 5500
    sd35_tiny_steps: int = 4500
    lr: float = 1.5e-3
    finishing_pictures: int = 16_000
    finishing_steps: int = 500
    finishing_lr: float = 4e-4
    batch_size: int = 64
    prompts: int = 256


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with ``args``; None takes the arguments of the process."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretraining.pipelines", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for sd_tiny/ and sd35_tiny/")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on steps, pictures, prompts (quick trials)")
    parser.add_argument("--only", choices=PIPELINES, help="train this denoiser on the latents in DIR/pretraining")
    parser.add_argument("--same-vae", choices=PIPELINES, help="train only this denoiser, with the shipped autoencoder")
    options = parser.parse_args(args)
    recipe = Recipe(seed=options.seed).scaled(options.scale)
    if options.same_vae:
        torch.set_num_threads(1)
        vae = AutoencoderKL.from_pretrained(PIPELINE_FOLDERS["sd_tiny"] / "vae")
        prepare_latents(recipe, options.output / "pretraining", vae)
        pretrain_denoiser(options.same_vae, recipe, options.output)
        shutil.rmtree(options.output / "pretraining")
        return
    if options.only:
        torch.set_num_threads(1)
        pretrain_denoiser(options.only, recipe, options.output)
        return
    torch.set_num_threads(2)
    prepare_latents(recipe, options.output / "pretraining")
    command = [sys.executable, "-m", "tools.pretraining.pipelines", "--output", str(options.output)]
    command += ["--seed", str(options.seed), "--scale", str(options.scale)]
    trainings = [subprocess.Popen([*command, "--only", name]) for name in PIPELINES]
    codes = [training.wait() for training in trainings]
    if any(codes):
        raise SystemExit("a denoiser's pretraining failed; its error is above")
    shutil.rmtree(options.output / "pretraining")


def prepare_latents(recipe: Recipe, folder: Path, vae: AutoencoderKL | None = None) -> None:
    """Train the autoencoder if none is given, encode the denoisers' training pictures, and save both in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if vae is None:
        vae = train_vae(recipe.seed, recipe.vae_pictures, recipe.vae_steps, recipe.decoder_steps)
    vae.save_pretrained(folder / "vae")
    for phase, number, clean_share, stream in (
        ("main", recipe.pictures, 0.6, 1),
        ("finishing", recipe.finishing_pictures, 0.8, 3),
    ):
        rng = np.random.default_rng([recipe.seed, stream])
        pictures, captions = draw_training_pictures(number, rng, clean_share=clean_share)
        torch.save({"latents": encode_pictures(vae, pictures), "tokens": tokenize(captions)}, folder / f"{phase}.pt")


def pretrain_denoiser(name: str, recipe: Recipe, output: Path) -> None:
    """Train the denoiser of one pipeline, save the pipeline in ``output / name``, and evaluate the pipeline.

    :func:`prepare_latents` must have written the subfolder ``pretraining`` of ``output``.
    """
    vae = AutoencoderKL.from_pretrained(output / "pretraining" / "vae")
    torch.manual_seed(recipe.seed)
    pipeline = PIPELINES[name](vae)
    (empty,) = tokenize([""])
    for phase, steps, lr in (
        ("main", getattr(recipe, f"{name}_steps"), recipe.lr),
        ("finishing", recipe.finishing_steps, recipe.finishing_lr),
    ):
        stored = torch.load(output / "pretraining" / f"{phase}.pt", weights_only=True)
        settings = {"seed": recipe.seed, "steps": steps, "batch_size": recipe.batch_size, "lr": lr}
        train_denoiser(pipeline, stored, empty, name=f"{name} {phase}", **settings)
    save_pipeline(pipeline, output / name)
    describe_pipeline(output / name, recipe)


def describe_pipeline(folder: Path, recipe: Recipe) -> None:
    """Evaluate a saved pipeline, and write ``recipe.json`` and ``README.md`` to its folder."""
    captions = held_out_captions(recipe.prompts, seed=0)
    pictures = sample_pictures(load_pipeline(folder), captions, seed=0)
    figures = mean_verdict(captions, list(pictures))
    print(f"{folder.name}: {json.dumps(figures)}", flush=True)
    sampling = {"prompts": recipe.prompts, "num_inference_steps": 20, "guidance_scale": 3.0, "seed": 0}
    content = {"recipe": asdict(recipe), "figures": figures, "sampling": sampling}
    (folder / "recipe.json").write_text(json.dumps(content, indent=1))
    shown = {name: f"{value:.3f}" for name, value in figures.items()}
    (folder / "README.md").write_text(readme(folder.name, prompts=recipe.prompts, **shown))


if __name__ == "__main__":
    main()
