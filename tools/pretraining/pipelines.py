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
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor, nn

from latentreward.core.errors import InputError
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline, sample_pictures
from tools.emoji.judge import EmojiTraining
from tools.pretraining.networks import TRAINED, build_pipeline, save_pipeline
from tools.pretraining.tokenizer import tokenize
from tools.pretraining.training import TrainingRecipe, readme, train_averaged
from tools.pretraining.vae import draw_training_pictures, encode_pictures, train_vae
from tools.pretraining.worlds import TrainingWorld

CAPTION_DROPOUT = 0.1
"""Share of captions replaced by the empty caption, which classifier-free guidance needs."""
MIN_SNR_GAMMA = 5.0
"""Gamma of the min-SNR weighting: the weight of a noise level is min(SNR, gamma) / SNR."""
TRAINING_SHIFT = 2.0
"""Timestep shift of the noise levels in the training of the rectified-flow network."""

WORLDS = {"shapes": TrainingWorld, "emoji": EmojiTraining}


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """Training settings of the shipped pipelines. Updates are counted in steps."""

    seed: int = 0  # of pictures, initial weights, batches and noise
    vae_pictures: int = 24_000  # training pictures of the autoencoder, 60 % of them without nuisances
    pictures: int = 48_000  # training pictures of the denoisers, 60 % of them without nuisances
    vae_steps: int = 3000
    decoder_steps: int = 2000  # further ones of the autoencoder's decoder alone
    sd_tiny_steps: int = 5500  # of the U-Net and its text encoder
    sd35_tiny_steps: int = 4500  # of the transformer and its text encoders
    lr: float = 1.5e-3  # peak learning rate of the denoisers
    finishing_pictures: int = 16_000  # of a last phase for higher quality, 80 % of them without nuisances
    finishing_steps: int = 500  # of each denoiser in the last phase
    finishing_lr: float = 4e-4  # peak learning rate of the last phase
    batch_size: int = 64  # pictures per update of a denoiser
    prompts: int = 256  # held-out captions that the pipelines are evaluated on


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with ``args``; None takes the arguments of the process."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretraining.pipelines", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for sd_tiny/ and sd35_tiny/")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on steps, pictures, prompts (quick trials)")
    parser.add_argument("--only", choices=PIPELINE_FOLDERS, help="train this denoiser on DIR/pretraining")
    parser.add_argument("--same-vae", choices=PIPELINE_FOLDERS, help="train this denoiser with a trained VAE")
    parser.add_argument("--vae", type=Path, default=PIPELINE_FOLDERS["sd_tiny"] / "vae", help="its folder")
    parser.add_argument("--world", choices=WORLDS, default="shapes", help="what the pictures show")
    options = parser.parse_args(args)
    world = open_world(options.world, parser)
    recipe = Recipe(seed=options.seed).scaled(options.scale)
    latents = options.output / "pretraining"
    torch.set_num_threads(1 if options.only or options.same_vae else 2)
    if options.same_vae:
        prepare_latents(recipe, latents, world, AutoencoderKL.from_pretrained(options.vae))
    if name := options.only or options.same_vae:
        pretrain_denoiser(name, recipe, options.output, world)
    else:
        prepare_latents(recipe, latents, world)
        command = [sys.executable, "-m", "tools.pretraining.pipelines", "--output", str(options.output)]
        command += ["--seed", str(options.seed), "--scale", str(options.scale), "--world", options.world]
        trainings = [subprocess.Popen([*command, "--only", name]) for name in PIPELINE_FOLDERS]
        codes = [training.wait() for training in trainings]
        if any(codes):
            raise SystemExit("a denoiser's pretraining failed; its error is above")
    if not options.only:
        shutil.rmtree(latents)


def open_world(name: str, parser: argparse.ArgumentParser) -> TrainingWorld:
    """Open a world, or end the command with one line if its pictures are missing."""
    try:
        return WORLDS[name]()
    except InputError as error:
        parser.error(str(error))


def prepare_latents(recipe: Recipe, folder: Path, world: TrainingWorld, vae: AutoencoderKL | None = None) -> None:
    """Train the autoencoder if none is given, encode the denoisers' training pictures, and save both in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if vae is None:
        vae = train_vae(recipe.seed, recipe.vae_pictures, recipe.vae_steps, recipe.decoder_steps, world)
    vae.save_pretrained(folder / "vae")
    world.prepare(folder.parent, vae, recipe.seed, recipe.vae_pictures, recipe.vae_steps)
    for phase, number, clean_share, stream in (
        ("main", recipe.pictures, 0.6, 1),
        ("finishing", recipe.finishing_pictures, 0.8, 3),
    ):
        rng = np.random.default_rng([recipe.seed, stream])
        pictures, captions = draw_training_pictures(number, rng, world.pretraining, clean_share, world)
        tokens = tokenize(captions, world.words)
        torch.save({"latents": encode_pictures(vae, pictures), "tokens": tokens}, folder / f"{phase}.pt")


def pretrain_denoiser(name: str, recipe: Recipe, output: Path, world: TrainingWorld) -> None:
    """Train the denoiser of one pipeline, save the pipeline in ``output / name``, evaluate and describe it there.

    :func:`prepare_latents` must have written the subfolder ``pretraining`` of ``output``.
    """
    vae = AutoencoderKL.from_pretrained(output / "pretraining" / "vae")
    pipeline = build_pipeline(name, vae, recipe.seed, world.words)
    trained = nn.ModuleList(getattr(pipeline, part) for part in TRAINED if getattr(pipeline, part, None) is not None)
    loss = sd_loss if hasattr(pipeline, "unet") else sd35_loss
    (empty,) = tokenize([""], world.words)
    for phase, steps, lr in (
        ("main", getattr(recipe, f"{name}_steps"), recipe.lr),
        ("finishing", recipe.finishing_steps, recipe.finishing_lr),
    ):
        stored = torch.load(output / "pretraining" / f"{phase}.pt", weights_only=True)
        torch.manual_seed(recipe.seed)
        rng = np.random.default_rng([recipe.seed, 2])
        losses = (loss(pipeline, *draw_batch(stored, empty, recipe.batch_size, rng)) for _ in range(steps))
        adamw = {"weight_decay": 0.01, "fused": True}
        trained.train()
        train_averaged(trained, losses, steps=steps, lr=lr, name=f"{name} {phase}", warmup=200, decay=0.999, **adamw)
        trained.eval()
    folder = output / name
    save_pipeline(pipeline, folder)
    captions = world.held_out_captions(recipe.prompts, seed=0)
    figures = world.mean_verdict(captions, sample_pictures(load_pipeline(folder), captions, seed=0), output)
    print(f"{name}: {json.dumps(figures)}", flush=True)
    sampling = {"prompts": recipe.prompts, "num_inference_steps": 20, "guidance_scale": 3.0, "seed": 0}
    content = {"recipe": asdict(recipe), "figures": figures, "sampling": sampling}
    (folder / "recipe.json").write_text(json.dumps(content, indent=1))
    shown = {figure: f"{value:.3f}" for figure, value in figures.items()}
    (folder / "README.md").write_text(readme(world.readme or name, pipeline=name, prompts=recipe.prompts, **shown))


def draw_batch(
    stored: dict[str, Tensor], empty: Tensor, batch_size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a batch of ``latents`` ``(B, 4, 8, 8)`` and ``tokens`` ``(B, 16)``, some of them of the empty caption."""
    rows = rng.integers(len(stored["latents"]), size=batch_size)
    dropped = torch.from_numpy(rng.random(batch_size) < CAPTION_DROPOUT)
    return stored["latents"][rows], torch.where(dropped[:, None], empty, stored["tokens"][rows])


def sd_loss(pipeline: StableDiffusionPipeline, latents: Tensor, tokens: Tensor) -> Tensor:
    """Compute the mean squared error of the predicted noise with min-SNR weights (arXiv:2303.09556).

    ``latents`` ``(B, 4, 8, 8)`` are scaled; ``tokens`` are ``(B, 16)``.
    """
    timesteps = (stratified_uniform(len(latents)) * pipeline.scheduler.config.num_train_timesteps).long()
    noise = torch.randn_like(latents)
    noisy_latents = pipeline.scheduler.add_noise(latents, noise, timesteps)
    prompt_embeds = pipeline.text_encoder(tokens)[0]
    noise_pred = pipeline.unet(noisy_latents, timesteps, prompt_embeds).sample
    alphas_cumprod = pipeline.scheduler.alphas_cumprod[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return ((noise_pred - noise).square().mean(dim=(1, 2, 3)) * (MIN_SNR_GAMMA / snr).clamp(max=1)).mean()


def sd35_loss(pipeline: StableDiffusion3Pipeline, latents: Tensor, tokens: Tensor) -> Tensor:
    """Compute the mean squared error of the predicted velocity.

    ``latents`` ``(B, 4, 8, 8)`` are scaled; ``tokens`` are ``(B, 16)``.
    """
    sigmas = stratified_uniform(len(latents))
    sigmas = TRAINING_SHIFT * sigmas / (1 + (TRAINING_SHIFT - 1) * sigmas)
    noise = torch.randn_like(latents)
    weight = sigmas[:, None, None, None]
    # The pipeline reads both text encoders before their last layer and pools their projections.
    texts = [e(tokens, output_hidden_states=True) for e in (pipeline.text_encoder, pipeline.text_encoder_2)]
    velocity = pipeline.transformer(
        hidden_states=(1 - weight) * latents + weight * noise,
        timestep=1000 * sigmas,
        encoder_hidden_states=torch.cat([text.hidden_states[-2] for text in texts], dim=-1),
        pooled_projections=torch.cat([text.text_embeds for text in texts], dim=-1),
    ).sample
    return (velocity - (noise - latents)).square().mean()


def stratified_uniform(number: int) -> Tensor:
    """Draw ``number`` values in [0, 1), one in each of ``number`` equal bins, in ascending order.

    The mean of a loss over these values has less variance than over independent values.
    """
    return (torch.arange(number) + torch.rand(number)) / number


if __name__ == "__main__":
    main()
