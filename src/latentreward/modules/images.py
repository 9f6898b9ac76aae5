"""Latents of a batch's images: from pixels through the VAE, or from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from latentreward.backbones.base import DiffusionBackbone
from latentreward.contracts import PreferenceBatch
from latentreward.errors import InputError
from latentreward.modules.pair_noise import PairDraws

if TYPE_CHECKING:
    from latentreward.policies import Policy

Posterior = Literal["sample", "mode"]
Side = Literal["chosen", "rejected"]


def latents_of(
    network: Policy | DiffusionBackbone,
    batch: PreferenceBatch,
    draws: PairDraws,
    posterior: Posterior,
    sides: Sequence[Side] = ("chosen", "rejected"),
) -> Tensor:
    """Return the latents of ``sides`` of a batch, one side after the other: ``(len(sides) · B, C, ...)`` float32.

    The VAE of ``network`` encodes pixels, to a sample of its posterior or to the mode.

    Raises:
        InputError: If the batch holds latents of another space than the network's, or pixels without a VAE.
    """
    # In float32 before `cat`, which raises for float16 under bfloat16 autocast on a CPU.
    images = torch.cat([getattr(batch, side).float() for side in sides])
    kind = "backbone" if isinstance(network, DiffusionBackbone) else "policy"
    if batch.latent_space is not None:
        if batch.latent_space != network.latent_space:
            raise InputError(
                f"the data holds latents of the space [{batch.latent_space}], but the {kind} takes "
                f"[{network.latent_space}]; encode the images with the {kind}'s own VAE"
            )
        return images
    if network.vae is None:
        raise InputError(f"the data holds pixels, but this {kind} has no VAE; load a full pipeline folder")
    noise = None
    if posterior == "sample":
        both = draws.normal("posterior", network.vae.latent_shape(images), per_image=True)
        chosen, rejected = both.chunk(2)
        noise = torch.cat([{"chosen": chosen, "rejected": rejected}[side] for side in sides]).to(images.device)
    return network.vae.encode(images, noise)
