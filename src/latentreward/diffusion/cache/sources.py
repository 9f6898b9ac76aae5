"""Sources of a cache's latents: a pipeline's VAE, or a published cache of latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from latentreward.core.contracts import LatentSpace, PathText
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.data.readers.base import Contents
from latentreward.diffusion.cache.layout import CacheDtype, TextSpec

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.prompts import PromptEncoder
    from latentreward.diffusion.encoders.vae import LatentEncoder
    from latentreward.diffusion.families.base import Family

RELEASED_SPACE = LatentSpace(channels=16, downscale=8, scaling_factor=1.5305, shift_factor=0.0609)
"""Latent space of Stable Diffusion 3 and 3.5, which DiNa-LRM's released cache uses."""
CLIP = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
"""Text encoders of Stable Diffusion, the second of SDXL alone, and their classes."""


@dataclass(frozen=True)
class Encoders:
    """Encoders of images and prompts, on the CPU, with their records for the cache's settings (:class:`CacheSpec`)."""

    space: LatentSpace  # space of the latents
    side_multiple: int  # number of pixels of which both sides of an image must be multiples
    vae: LatentEncoder | None = None  # VAE; None if the reader already holds latents
    vae_fingerprint: str | None = None  # fingerprint of the VAE; None without a VAE
    text: PromptEncoder | None = None  # text encoder; None if prompts are not cached
    text_spec: TextSpec | None = None  # settings of the text embeddings; None if prompts are not cached


class LatentSource(ABC):
    """Base class of the sources of a cache's latents."""

    holds: Contents  # contents that the reader must have: ``images`` or ``latents``
    origin: str  # name of the source in the spec
    vae_dtype: CacheDtype | None = None  # dtype that the VAE runs in; None without a VAE
    posterior: Literal["sample", "mode"] | None = None  # sample or mode of the VAE's posterior; None without a VAE
    batch_size: int  # number of images encoded together

    def check_sources(self, number: int) -> None:  # noqa: B027 - a source of latents alone knows no network
        """Raise InputError if the network that the latents are for does not edit this number of pictures."""

    def check_prompt(self, prompt: str) -> None:  # noqa: B027
        """Raise InputError if the text encoder does not take the prompt."""

    @abstractmethod
    def load(self) -> Encoders:
        """Load the encoders, without the diffusion network."""


class PipelineEncoders(LatentSource):
    """Latents from the VAE, and optionally embeddings from the text encoders, of a diffusers pipeline.

    The pipeline's U-Net or transformer is not loaded. It may be missing or of no known family if it is not needed to
    tell how images and prompts are encoded: an ``AutoencoderKL`` encodes images as Stable Diffusion's does, and without
    a transformer CLIP encodes prompts as Stable Diffusion's does.

    Args:
        source: Diffusers pipeline folder, hub id, or a shipped pipeline: ``sd_tiny`` or ``sd35_tiny``.
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.
        vae_dtype: Dtype of the VAE; SDXL's VAE overflows in float16.
        posterior: ``sample`` stores one sample of the VAE's posterior per image, ``mode`` stores its mode.
        batch_size: Number of images encoded together.
        text: ``states`` or True caches the embeddings of each distinct prompt, only for models whose text encoder is
            frozen; ``none`` or False caches none. A text encoder that sees the pictures of edits needs ``states``; then
            a text with other pictures is another prompt.
        text_dtype: Dtype of the text encoders.
        text_batch_size: Number of prompts encoded together.
        prompts_per_shard: Largest number of prompts in a file; SD3's embeddings take 2.6 MiB per prompt in 16 bits.
        load_t5: Whether to use T5 (SD3, SD3.5).
        t5_length: Number of T5 tokens per prompt, which must be that of the reward model; None takes the pipeline's
            own (256 for SD3 and SD3.5, 0 for ``sd35_tiny``).
        family: Import path of the pipeline's :class:`~latentreward.diffusion.Family`, for a family of one's own; None
            finds it among those of this package.
    """

    holds: Contents = "images"
    origin = "vae"

    def __init__(
        self,
        source: PathText,
        revision: str | None = None,
        variant: str | None = None,
        vae_dtype: CacheDtype = "float32",
        posterior: Literal["sample", "mode"] = "sample",
        batch_size: int = 8,
        text: bool | Literal["none", "states"] = False,
        text_dtype: CacheDtype = "float32",
        text_batch_size: int = 32,
        prompts_per_shard: int = 256,
        load_t5: bool = True,
        t5_length: int | None = None,
        family: str | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "text_batch_size": text_batch_size, "prompts_per_shard": prompts_per_shard}
        check_at_least_one("encoder.", **sizes)
        self.source, self.revision, self.variant = source, revision, variant
        self.vae_dtype, self.posterior, self.batch_size = vae_dtype, posterior, batch_size
        self.text, self.text_dtype = text in (True, "states"), text_dtype
        self.text_batch_size, self.prompts_per_shard = text_batch_size, prompts_per_shard
        self.load_t5, self.t5_length, self.family = load_t5, t5_length, family

    def check_sources(self, number: int) -> None:
        """See :meth:`LatentSource.check_sources`; a network of no known family may edit any number."""
        family, known = self._found
        if known:
            family.check_sources(number)
        if number and family.sees_sources and not self.text:
            raise InputError(
                f"the text encoder of {family.title} reads the {number} sources of a pair too, and without them no "
                "training can encode prompts; set encoder.text: states"
            )

    def check_prompt(self, prompt: str) -> None:
        self._found[0].check_prompt(prompt)

    @cached_property
    def _found(self) -> tuple[Family, bool]:
        """The family of the pipeline, and whether it is known; if not, it is taken for Stable Diffusion."""
        from lightning.pytorch.utilities import rank_zero_warn

        from latentreward.diffusion.backbones.loading import PipelineSource
        from latentreward.diffusion.families.find import find_family
        from latentreward.diffusion.families.sd import StableDiffusion

        pipeline = PipelineSource(self.source, self.revision, self.variant)
        try:
            return find_family(pipeline, self.family), True
        except InputError as error:
            # Where the network is not needed and not known, images and prompts are taken for those of Stable Diffusion.
            usual_vae = pipeline.has("vae") and pipeline.config("vae").get("_class_name") == "AutoencoderKL"
            text = {part: pipeline.index[part][1] for part in CLIP if pipeline.has(part)}
            usual_text = "text_encoder" in text and text.items() <= CLIP.items() and not pipeline.has("transformer")
            if self.family is not None or not usual_vae or (self.text and not usual_text):
                raise
            rank_zero_warn(f"encoder: {error}; {'VAE and CLIP are' if self.text else 'the VAE is'} cached all the same")
            return StableDiffusion(pipeline), False

    def load(self) -> Encoders:
        """Load the encoders and compute their fingerprints.

        Raises:
            InputError: If the source is not a pipeline with these parts.
        """
        from latentreward.diffusion.backbones.weights import settle
        from latentreward.diffusion.encoders.fingerprint import text_fingerprint, vae_fingerprint

        family, known = self._found
        if known:
            family.report_assumption("encoder")
        vae = family.load_latent_encoder(self.vae_dtype)
        images = vae.space, family.side_multiple, vae, vae_fingerprint(vae.vae)
        if not self.text:
            return Encoders(*images)
        encoder = family.load_prompt_encoder(self.t5_length, self.load_t5).eval().requires_grad_(False)
        settle(encoder, getattr(torch, self.text_dtype))  # T5 in float32 would take 19 GB before it is rounded
        spec = TextSpec(
            fingerprint=text_fingerprint(encoder),
            num_tokens=encoder.num_tokens,
            token_dim=encoder.token_dim,
            pooled_dim=encoder.pooled_dim,
            dtype=self.text_dtype,
            batch_size=self.text_batch_size,
            prompts_per_shard=self.prompts_per_shard,
            masked=encoder.masked,
        )
        return Encoders(*images, encoder, spec)


class PublishedLatents(LatentSource):
    """Latents that the reader already holds, such as the released diffusion-rm cache; only their dtype is converted.

    Args:
        latent_space: Space of the latents, which their files do not record; the default is that of SD3 and SD3.5.
        origin: Name of the published cache, recorded in the plan.
        batch_size: Number of images copied together.
    """

    holds: Contents = "latents"

    def __init__(
        self, latent_space: LatentSpace = RELEASED_SPACE, origin: str = "diffusion-rm", batch_size: int = 32
    ) -> None:
        check_at_least_one("encoder.", batch_size=batch_size)
        self.latent_space, self.origin, self.batch_size = latent_space, origin, batch_size

    def load(self) -> Encoders:
        """Return the latent space alone; no encoder is loaded."""
        return Encoders(self.latent_space, self.latent_space.downscale)
