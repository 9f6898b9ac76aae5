"""What a cache is made of: the sizes of its images, and its encoders: a pipeline's, or none for published latents."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from latentreward.core.contracts import LatentSpace, PathText
from latentreward.core.errors import InputError, check_at_least_one, check_multiples
from latentreward.data.clips import FPS, check_clips, require_pyav
from latentreward.data.image_sizes import MIN_PIXELS, PUBLISHED_BUCKETS, Bucket, assign_bucket, sort_buckets
from latentreward.data.images import MAX_PIXELS, ResizePolicy
from latentreward.data.readers.base import Contents

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.prompts import PromptEncoder
    from latentreward.diffusion.encoders.vae import LatentEncoder
    from latentreward.diffusion.families.base import Family

CacheDtype = Literal["float16", "bfloat16", "float32"]
CROSS_BUCKET_ASPECT = 0.05  # relative difference of two aspect ratios from which two images cannot share a bucket
TOO_SMALL = "image below min_pixels"
NO_BUCKET = "image in no bucket"
OTHER_ASPECT = "images of different aspect ratio"
OTHER_SHAPE = "latents of different shapes"
"""Reasons why a pair is left out."""
RELEASED_SPACE = LatentSpace(channels=16, downscale=8, scaling_factor=1.5305, shift_factor=0.0609)
"""Latent space of Stable Diffusion 3 and 3.5, which DiNa-LRM's released cache uses."""


@dataclass(frozen=True)
class ImageSettings:
    """Settings for the sizes to which images are resized before they are encoded.

    With ``size``, every image is resized to that size. Otherwise, an image is resized to one of several bucket sizes:
    among the buckets whose aspect ratio differs from the image's by at most 3 %, the bucket nearest in area. A pair
    with an image that fits no bucket is left out. If the buckets of a pair's images differ, both come to the bucket of
    their mean size; the pair is left out if their aspect ratios differ by 5 % or more, or no bucket fits.

    Args:
        size: Side in pixels, or (height, width), of every image; None for buckets.
        buckets: (height, width) of each bucket; None takes the 13 buckets of the released diffusion-rm cache.
        resize: ``center_crop`` crops both ends of the axis that is too long for the aspect ratio, and resizes with a
            Lanczos filter. ``stretch`` resizes both axes independently, bilinear, as in LRM's training.
        min_pixels: Smallest number of pixels of an image; pairs with a smaller image are left out. None takes 65,536
            with buckets and no limit with ``size``.
        max_pixels: Largest number of pixels in an image's header; larger images count as unreadable.
        frames: Number of frames of clips, whose files are mp4 files; needs ``size``. 1 for images.
        fps: Frames per second of clips, see :class:`~latentreward.data.clips.ClipLoader`.
    """

    size: int | tuple[int, int] | None = None
    buckets: tuple[tuple[int, int], ...] | None = None
    resize: ResizePolicy = "center_crop"
    min_pixels: int | None = None
    max_pixels: int = MAX_PIXELS
    frames: int = 1
    fps: float = FPS

    def __post_init__(self) -> None:
        check_clips("images.", self.frames, self.fps)
        if self.frames > 1 and self.needs_headers():
            raise InputError(
                f"images.frames={self.frames}: clips come to one size, whatever theirs; set images.size, and leave "
                "buckets and min_pixels out"
            )
        if self.size is not None and self.buckets is not None:
            raise InputError("images.size and images.buckets are both set; all images come to one size, or to buckets")
        if self.size is not None:
            check_at_least_one("images.", size=min(self.sizes()[0]))

    def sizes(self) -> tuple[Bucket, ...]:
        """Return the (height, width) to which images are resized, by ascending area."""
        if self.size is not None:
            return (Bucket(self.size, self.size) if isinstance(self.size, int) else Bucket(*self.size),)
        return PUBLISHED_BUCKETS if self.buckets is None else sort_buckets(self.buckets)

    def smallest(self) -> int:
        """Return ``min_pixels``, or its default if None."""
        return self.min_pixels if self.min_pixels is not None else MIN_PIXELS if self.size is None else 0

    def needs_headers(self) -> bool:
        """Tell whether planning needs the sizes of images, which are read from their headers."""
        return self.size is None or self.smallest() > 0

    def check(self, multiple: int) -> None:
        """Raise InputError if a side is not a multiple of the ``multiple`` pixels that the model needs."""
        require_pyav(self.frames)
        for bucket in self.sizes():
            check_multiples(f"images.buckets: {bucket}" if self.size is None else "images.size", bucket, multiple)

    def sizes_of_pair(self, a: Bucket | None, b: Bucket | None) -> tuple[Bucket, Bucket] | str:
        """Return the sizes at which the two images of a pair are cached, or the reason why the pair is left out.

        Their own sizes in pixels are None if :meth:`needs_headers` is false.
        """
        if a is not None and b is not None and min(a.area, b.area) < self.smallest():
            return TOO_SMALL
        if self.size is not None:
            return self.sizes() * 2  # type: ignore[return-value]
        assert a is not None and b is not None
        own = self._bucket(*a), self._bucket(*b)
        if own[0] is None or own[1] is None:
            return NO_BUCKET
        if own[0] == own[1]:
            return own[0], own[1]
        aspects = sorted((a.width / a.height, b.width / b.height))
        mean = self._bucket(round(math.sqrt(a.height * b.height)), round(math.sqrt(a.width * b.width)))
        return OTHER_ASPECT if mean is None or aspects[1] / aspects[0] - 1 >= CROSS_BUCKET_ASPECT else (mean, mean)

    def sizes_of_latents(self, a: Bucket, b: Bucket, *sources: Bucket) -> tuple[Bucket, Bucket] | str:
        """Return the sizes of a pair of latents, which are not resized and all of one size, or why it is left out."""
        if {b, *sources} != {a}:
            return OTHER_SHAPE
        return (a, b) if a in self.sizes() else NO_BUCKET

    def _bucket(self, height: int, width: int) -> Bucket | None:
        return assign_bucket(height, width, self.sizes(), min_pixels=self.smallest())


@dataclass(frozen=True)
class TextSpec:
    """Settings of the text embeddings in a cache."""

    fingerprint: str  # see :func:`latentreward.diffusion.encoders.fingerprint.text_fingerprint`
    num_tokens: int  # number of tokens of each prompt; with a mask, the greatest number
    token_dim: int  # D of ``prompt_embeds``
    pooled_dim: int  # P of ``pooled_prompt_embeds`` (N, P); 0 if there is none
    dtype: CacheDtype  # dtype that the text encoders ran in
    batch_size: int  # number of prompts encoded together
    prompts_per_shard: int  # largest number of prompts in a file
    masked: bool = False  # whether prompts have unequal numbers of tokens, see :attr:`PromptEncoder.masked`


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

    The pipeline's U-Net or transformer is not loaded; its config tells how images and prompts are encoded.

    Args:
        source: Diffusers pipeline folder, hub id, or a shipped pipeline: ``sd_tiny`` or ``sd35_tiny``.
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.
        vae_dtype: Dtype of the VAE; SDXL's VAE overflows in float16.
        posterior: ``sample`` stores one sample of the VAE's posterior per image, ``mode`` stores its mode.
        batch_size: Number of images encoded together.
        text: Whether to cache the embeddings of each distinct prompt, only for models whose text encoder is frozen. A
            text encoder that sees the pictures of edits needs it; then a text with other pictures is another prompt.
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
        text: bool = False,
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
        self.text, self.text_dtype = text, text_dtype
        self.text_batch_size, self.prompts_per_shard = text_batch_size, prompts_per_shard
        self.load_t5, self.t5_length, self.family = load_t5, t5_length, family

    def check_sources(self, number: int) -> None:
        self._family.check_sources(number)
        if number and self._family.sees_sources and not self.text:  # training could not encode prompts without them
            reads = f"the text encoder of {self._family.title} reads the {number} sources of a pair too"
            raise InputError(f"{reads}; set encoder.text: true")

    def check_prompt(self, prompt: str) -> None:
        self._family.check_prompt(prompt)

    @cached_property
    def _family(self) -> Family:
        from latentreward.diffusion.backbones.loading import PipelineSource
        from latentreward.diffusion.families.base import find_family

        return find_family(PipelineSource(self.source, self.revision, self.variant), self.family)

    def load(self) -> Encoders:
        from latentreward.diffusion.backbones.weights import settle
        from latentreward.diffusion.encoders.fingerprint import text_fingerprint, vae_fingerprint

        family = self._family
        family.report_assumption("encoder")
        vae = family.load_latent_encoder(self.vae_dtype)
        images = vae.space, family.side_multiple, vae, vae_fingerprint(vae.vae)
        if not self.text:
            return Encoders(*images)
        encoder = family.load_prompt_encoder(self.t5_length, self.load_t5).eval().requires_grad_(False)
        settle(encoder, getattr(torch, self.text_dtype))  # T5 in float32 would take 19 GB before it is rounded
        sizes = encoder.num_tokens, encoder.token_dim, encoder.pooled_dim
        batches = self.text_batch_size, self.prompts_per_shard
        spec = TextSpec(text_fingerprint(encoder), *sizes, self.text_dtype, *batches, encoder.masked)
        return Encoders(*images, encoder, spec)


class PublishedLatents(LatentSource):
    """Latents that the reader already holds, such as the released diffusion-rm cache; only their dtype is converted.

    Args:
        latent_space: Space of the latents, which their files do not record; the default is that of SD3 and SD3.5.
    """

    holds: Contents = "latents"
    origin = "diffusion-rm"
    batch_size = 32

    def __init__(self, latent_space: LatentSpace = RELEASED_SPACE) -> None:
        self.latent_space = latent_space

    def load(self) -> Encoders:
        return Encoders(self.latent_space, self.latent_space.downscale)
