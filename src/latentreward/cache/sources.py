"""Where the latents of a cache come from: a pipeline's VAE, or a published cache of latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from latentreward.cache.layout import CacheDtype, TextSpec
from latentreward.contracts import LatentSpace
from latentreward.data.readers.base import Contents
from latentreward.errors import check_at_least_one

if TYPE_CHECKING:
    from latentreward.backbones.loading import PipelineSource
    from latentreward.encoders.prompts import PromptEncoder
    from latentreward.encoders.vae import LatentEncoder

SHIPPED = ("sd_tiny", "sd35_tiny")
RELEASED_SPACE = LatentSpace(channels=16, downscale=8, scaling_factor=1.5305, shift_factor=0.0609)
"""The space of Stable Diffusion 3 and 3.5, in which DiNa-LRM's cache was released."""


@dataclass(frozen=True)
class Encoders:
    """What turns the data into rows of shards, on the CPU, and what the spec says of it.

    Attributes:
        space: Space of the latents.
        vae: None where the latents are there already.
        vae_fingerprint: None likewise.
        text: None if prompts are not cached.
        text_spec: None likewise.
    """

    space: LatentSpace
    vae: LatentEncoder | None = None
    vae_fingerprint: str | None = None
    text: PromptEncoder | None = None
    text_spec: TextSpec | None = None


class LatentSource(ABC):
    """Where latents come from.

    Attributes:
        holds: What the reader's images must hold.
        origin: Name of the source in the spec.
        vae_dtype: Precision that the VAE runs in; None without one.
        posterior: Whether latents are a sample or the mode of the VAE's posterior; None without one.
        batch_size: Images encoded together.
    """

    holds: Contents
    origin: str
    vae_dtype: CacheDtype | None = None
    posterior: Literal["sample", "mode"] | None = None
    batch_size: int

    @abstractmethod
    def load(self) -> Encoders:
        """Load what encodes; nothing of the diffusion network."""


class PipelineEncoders(LatentSource):
    """VAE, and text encoders if wanted, of a diffusers pipeline; its U-Net or transformer is not loaded.

    Args:
        source: Diffusers pipeline folder, hub id, or a shipped pipeline: ``sd_tiny`` or ``sd35_tiny``.
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.
        vae_dtype: Precision of the VAE; SDXL's overflows in float16.
        posterior: Latents from a ``sample`` of the VAE's posterior, one per image for good, or from its ``mode``.
        batch_size: Images encoded together.
        text: Also cache the embeddings of each distinct prompt; only for models whose text encoder is frozen.
        text_dtype: Precision of the text encoders.
        text_batch_size: Prompts encoded together.
        prompts_per_shard: Most prompts of one file; SD3's embeddings take 2.6 MiB each in 16 bits.
        load_t5: False leaves T5 out (SD3, SD3.5).
        t5_length: T5 tokens per prompt (SD3, SD3.5), as the reward model will have them.
    """

    holds: Contents = "images"
    origin = "vae"

    def __init__(
        self,
        source: str,
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
        t5_length: int = 256,
    ) -> None:
        sizes = {"batch_size": batch_size, "text_batch_size": text_batch_size, "prompts_per_shard": prompts_per_shard}
        check_at_least_one("encoder.", **sizes)
        self.source, self.revision, self.variant = source, revision, variant
        self.vae_dtype, self.posterior, self.batch_size = vae_dtype, posterior, batch_size
        self.text, self.text_dtype = text, text_dtype
        self.text_batch_size, self.prompts_per_shard = text_batch_size, prompts_per_shard
        self.load_t5, self.t5_length = load_t5, t5_length

    def load(self) -> Encoders:
        """Load the encoders and take their fingerprints.

        Raises:
            InputError: If the source is no pipeline with these parts.
        """
        from latentreward.backbones.loading import PipelineSource, tiny_pipeline
        from latentreward.encoders.fingerprint import text_fingerprint, vae_fingerprint

        source = tiny_pipeline(self.source) if self.source in SHIPPED else self.source
        pipeline = PipelineSource(source, self.revision, self.variant)
        vae = pipeline.latent_encoder(self.vae_dtype)
        if not self.text:
            return Encoders(vae.space, vae, vae_fingerprint(vae.vae))
        text = self._prompt_encoder(pipeline).eval().requires_grad_(False)
        text = text.to(getattr(torch, self.text_dtype))
        spec = TextSpec(
            fingerprint=text_fingerprint(text),
            num_tokens=text.num_tokens,
            token_dim=text.token_dim,
            pooled_dim=text.pooled_dim,
            dtype=self.text_dtype,
            batch_size=self.text_batch_size,
            prompts_per_shard=self.prompts_per_shard,
        )
        return Encoders(vae.space, vae, vae_fingerprint(vae.vae), text, spec)

    def _prompt_encoder(self, pipeline: PipelineSource) -> PromptEncoder:
        if pipeline.has("transformer"):
            width = pipeline.config("transformer")["joint_attention_dim"]
            return pipeline.sd3_prompts(width, self.t5_length, self.load_t5)
        return pipeline.sdxl_prompts() if pipeline.has("text_encoder_2") else pipeline.clip_prompts()


class PublishedLatents(LatentSource):
    """Latents that a reader already holds, taken over as they are but for their type: the released diffusion-rm cache.

    Args:
        latent_space: Space of the latents, which their files do not tell; the default is that of SD3 and SD3.5.
        origin: Name of the published cache, for the record.
        batch_size: Images copied together.
    """

    holds: Contents = "latents"

    def __init__(
        self, latent_space: LatentSpace = RELEASED_SPACE, origin: str = "diffusion-rm", batch_size: int = 32
    ) -> None:
        check_at_least_one("encoder.", batch_size=batch_size)
        self.latent_space, self.origin, self.batch_size = latent_space, origin, batch_size

    def load(self) -> Encoders:
        """Nothing to load."""
        return Encoders(self.latent_space)
