"""Checks that caches agree with each other and with the model that is trained on them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from latentreward.cache.layout import CacheSpec
from latentreward.data.clips import check_frames
from latentreward.encoders.fingerprint import text_fingerprint, vae_fingerprint
from latentreward.errors import InputError

if TYPE_CHECKING:
    from latentreward.backbones.base import DiffusionBackbone
    from latentreward.policies import Policy

logger = logging.getLogger(__name__)


def check_caches(specs: Mapping[Path, CacheSpec], with_text: bool) -> CacheSpec:
    """Check that caches can be used together, and return the settings of the first cache.

    Different handling of EXIF orientation is only logged as a warning.

    Raises:
        InputError: If two caches hold latents of different VAEs, clips of different lengths or frame rates, or
            embeddings of different text encoders.
    """
    (first, spec), *others = specs.items()
    for folder, other in others:
        if (other.latent_space, other.vae) != (spec.latent_space, spec.vae):
            raise InputError(f"caches {first} and {folder} hold latents of different VAEs; write one of them again")
        if (found := _clips(other)) != (wanted := _clips(spec)):
            raise InputError(
                f"caches {first} and {folder} hold {wanted} and {found}; write one of them again, with the "
                "images.frames and images.fps of the other"
            )
        if with_text and other.text.fingerprint != spec.text.fingerprint:
            raise InputError(
                f"caches {first} and {folder} hold embeddings of different text encoders; write one of them again, or "
                "set data.cached_text: false"
            )
        if other.exif != spec.exif:
            logger.warning(
                "caches %s and %s treat EXIF orientation differently (exif: %s and %s)",
                first,
                folder,
                spec.exif,
                other.exif,
            )
    return spec


def _clips(spec: CacheSpec) -> str:
    """Describe the length and the frame rate of a cache's clips."""
    return "images" if spec.frames == 1 else f"clips of {spec.frames} frames at {spec.fps:g} per second"


def check_backbone(spec: CacheSpec, backbone: "DiffusionBackbone | Policy", with_text: bool) -> None:
    """Check that a cache was encoded as the backbone of a reward model, or a policy, encodes images and prompts.

    If the backbone has no VAE, or the cache does not record one, only the latent spaces are compared.

    Raises:
        InputError: If the latent space, the VAE or the text encoder differs, if embeddings are cached while the model
            trains its text encoder, or if the cache holds clips and the model takes images.
    """
    if spec.latent_space != backbone.latent_space:
        raise InputError(
            f"the cache holds latents of the space [{spec.latent_space}], but the model takes "
            f"[{backbone.latent_space}]; write the cache with the model's own VAE"
        )
    if spec.frames > 1:
        check_frames("the cache has images.", backbone, spec.frames)
    if backbone.vae is not None and spec.vae is not None:
        fingerprint = vae_fingerprint(backbone.vae.vae)
        if fingerprint != spec.vae:
            raise InputError(
                f"the cache was written with VAE {spec.vae}, but the model's VAE is {fingerprint} (another one, or its "
                "weights in another precision); write the cache with this model's VAE"
            )
    if with_text and spec.text is not None and backbone.text_encoder is not None:
        if any(parameter.requires_grad for parameter in backbone.text_encoder.parameters()):
            raise InputError(
                "prompt embeddings are cached, but the model trains its text encoder; set data.cached_text: false"
            )
        fingerprint = text_fingerprint(backbone.text_encoder)
        if fingerprint != spec.text.fingerprint:
            raise InputError(
                f"the cache holds embeddings of text encoder {spec.text.fingerprint} with {spec.text.num_tokens} "
                f"tokens, but the model's is {fingerprint} with {backbone.text_encoder.num_tokens}; set "
                "data.cached_text: false, or write the cache with this model's text encoder"
            )
