"""A tiny VAE of FLUX.2."""

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from tests.tiny_pipelines import PIXELS

CHANNELS = 4


def flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=CHANNELS, norm_num_groups=4, sample_size=PIXELS,
    )  # fmt: skip
    mean, variance = statistics()
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(variance)
    return vae


def statistics() -> tuple[Tensor, Tensor]:
    """Means and variances of the tiny VAE's batch norm; one variance is as small as the norm's epsilon."""
    variance = torch.linspace(0.5, 3.0, 4 * CHANNELS)
    variance[5] = 1e-4
    return torch.linspace(-1.0, 1.0, 4 * CHANNELS), variance
