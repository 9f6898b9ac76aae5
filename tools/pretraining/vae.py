"""Pretraining of the autoencoder that both tiny pipelines share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentreward.tinyworld.pairs import World
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS
from tools.pretraining.training import updates

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from tools.pretraining.worlds import TrainingWorld

KL_WEIGHT = 1e-6
"""Weight of the KL term, which is summed over a picture's latents; with 1e-4, the colour channels collapse."""
LATENT_STD = 5.489
"""Standard deviation of each latent channel before scaling: 1 / 0.18215, as in Stable Diffusion."""


def draw_training_pictures(
    number: int,
    rng: np.random.Generator,
    split: str = "train",
    clean_share: float = 0.6,
    world: World | None = None,
) -> tuple[Tensor, list[str]]:
    """Draw random captions of a world, by default of the shapes, and a picture without mutations for each.

    ``clean_share`` is the probability that a picture has no nuisances.

    Returns:
        Pictures ``(number, 3, 32, 32)``, uint8, and their captions.
    """
    world = world or World()
    captions = [world.draw_caption(rng, split) for _ in range(number)]
    sketches = [world.sketch(caption, rng, mutation_shares=(1.0,), clean_share=clean_share) for caption in captions]
    pictures = torch.from_numpy(np.stack([sketch.draw() for sketch in sketches]))
    return pictures.permute(0, 3, 1, 2).contiguous(), [caption.text for caption in captions]


def normalize_pictures(pictures: Tensor) -> Tensor:
    """Convert uint8 pictures in 0..255 to float32 in -1..1, the input of the networks."""
    return pictures.float() / 127.5 - 1.0


def build_vae() -> AutoencoderKL:
    """Build the untrained autoencoder of the shipped config: 32x32 pictures to 8x8 latents of 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(AutoencoderKL.load_config(PIPELINE_FOLDERS["sd_tiny"] / "vae"))


def train_vae(seed: int, number: int, steps: int, decoder_steps: int, world: TrainingWorld) -> AutoencoderKL:
    """Train encoder and decoder, standardise the latents, then train the decoder alone.

    ``number`` pictures of a world are drawn. The ``decoder_steps`` are on slightly noisy latents like those from
    samplers.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 0])
    pictures = draw_training_pictures(number, rng, world.pretraining, world=world)[0]
    vae = build_vae().to(memory_format=torch.channels_last)
    _fit([*vae.parameters()], _losses(vae, pictures, rng), steps, 3e-3, "vae")
    standardize_latents(vae, normalize_pictures(pictures[:4096]))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    weights = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    _fit(weights, _losses(vae, pictures, rng, noise=0.05 * LATENT_STD), decoder_steps, 2e-3, "decoder")
    return vae.requires_grad_(True).eval().to(memory_format=torch.contiguous_format)


def _losses(vae: AutoencoderKL, pictures: Tensor, rng: np.random.Generator, noise: float = 0.0) -> Iterator[Tensor]:
    """Yield the loss of random batches of 32 pictures, endlessly, with noise of a standard deviation on the latents."""
    while True:
        batch = normalize_pictures(pictures[rng.integers(len(pictures), size=32)])
        batch = batch.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        latents = posterior.sample()
        error = vae.decode(latents + noise * torch.randn_like(latents)).sample - batch
        yield error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * posterior.kl().mean()


def _fit(parameters: list[torch.nn.Parameter], losses: Iterator[Tensor], steps: int, lr: float, name: str) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for _ in updates(optimizer, schedule, losses, steps, name):
        pass


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Standardise latents by changing the 1x1 convolutions around them; reconstructions do not change.

    The posterior means of normalised ``pictures`` ``(B, 3, 32, 32)`` get mean 0 and standard deviation
    :data:`LATENT_STD` per channel.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(256)])
    mean = latents.mean(dim=(0, 2, 3))
    scale = LATENT_STD / latents.std(dim=(0, 2, 3))
    channels = len(mean)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] *= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - mean) * scale
    bias[channels:] += 2 * scale.log()
    # W (z / s + m) + b = (W / s) z + (W m + b)
    weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
    bias += weight[:, :, 0, 0] @ mean
    weight /= scale[None, :, None, None]


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode pictures ``(N, 3, 32, 32)``, uint8, to scaled posterior means, the input of the denoisers.

    Returns:
        Scaled latents ``(N, 4, 8, 8)``, float32, about unit variance.
    """
    parts = [vae.encode(normalize_pictures(part)).latent_dist.mean for part in pictures.split(256)]
    return torch.cat(parts) * vae.config.scaling_factor
