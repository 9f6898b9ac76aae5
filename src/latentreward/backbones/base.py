"""What every backbone promises, and how its weights are tuned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from latentreward.construction import Construction
from latentreward.contracts import Conditioning, Features, FeatureSpec, LatentSpace, join_rows, map_tensors
from latentreward.errors import InputError
from latentreward.noise import NoiseProcess

if TYPE_CHECKING:
    from latentreward.encoders.prompts import PromptEncoder
    from latentreward.encoders.vae import LatentEncoder


class DiffusionBackbone(nn.Module, ABC):
    """The part of a diffusion network that a reward head reads, with the encoders and the noise it was trained with.

    A subclass implements :meth:`read` and the properties below; nothing here assumes images: latents may have any
    number of axes after the channels.

    Args:
        noise_process: Forward process of the network.
        latent_space: Latents the network takes.
        text_encoder: Prompt encoder; None if conditioning comes from elsewhere.
        vae: Pixels → latents; None if latents come from elsewhere.

    Attributes:
        source: Folder or hub id of the weights, with the revision, as the user gave it; for messages.
        network_name: Attribute that holds the diffusers network, where :meth:`with_network` is implemented.
        takes_aspects: Whether the network was trained on images of other shapes than its native one.
        max_side: Largest side of latents that the network has positions for; None for any.
        built_by: Factory, or class, and the plain values that it was called with; None if it was given anything else.
    """

    source: str = ""
    network_name: str = ""
    takes_aspects: bool = False
    max_side: int | None = None
    built_by: Construction | None = None
    _compared: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments; a registered factory then notes its own."""
        backbone = super().__new__(cls)
        object.__setattr__(backbone, "built_by", Construction.of(cls, args, kwargs))  # nn.Module's is not set up yet
        return backbone

    def __init__(
        self,
        noise_process: NoiseProcess,
        latent_space: LatentSpace,
        text_encoder: PromptEncoder | None = None,
        vae: LatentEncoder | None = None,
    ) -> None:
        super().__init__()
        self.noise_process = noise_process
        self.latent_space = latent_space
        self.text_encoder = text_encoder
        self.vae = vae

    @property
    @abstractmethod
    def feature_spec(self) -> FeatureSpec:
        """Widths and grids of what :meth:`read` returns."""

    @property
    def native_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the images that the network was trained on; None if it does not tell."""
        return None

    @property
    def side_multiple(self) -> int:
        """Sides of an image, in pixels, must be multiples of this."""
        return self.latent_space.downscale

    @abstractmethod
    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        """Features of ``latents`` ``(B, C, ...)`` at ``timesteps`` ``(B,)``, ``uncond`` left None."""

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning | None = None,
    ) -> Features:
        """Read features, for the empty prompt too if ``uncond`` is given, in one pass of twice the batch.

        Args:
            latents: ``(B, C, ...)`` scaled noisy latents.
            timesteps: ``(B,)`` of :attr:`noise_process`.
            conditioning: Encoded prompts, B rows.
            uncond: Encoded empty prompt, one row.

        Raises:
            InputError: If the latents have another number of channels than the network takes.
        """
        if latents.shape[1] != self.latent_space.channels:
            raise InputError(
                f"latents have {latents.shape[1]} channels, but this backbone takes latents of the space "
                f"[{self.latent_space}]; encode the images with the VAE of its own pipeline"
            )
        timesteps = timesteps.to(latents.device)
        if uncond is None:
            return self._as_promised(self.read(latents, timesteps, conditioning))
        size = len(latents)
        prompts = join_rows([conditioning, uncond.select([0] * size)])
        both = self._as_promised(self.read(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), prompts))
        return replace(rows_of(both, slice(size)), uncond=rows_of(both, slice(size, None)))

    def _as_promised(self, features: Features) -> Features:
        """Return ``features``; the first ones are compared with :attr:`feature_spec`, by which the head was made."""
        if not self._compared:
            check_features(features, self.feature_spec, type(self).__name__)
            self._compared = True
        return features

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts; each distinct prompt is encoded once."""
        if self.text_encoder is None:
            raise InputError("this backbone was built without a text encoder; load it from a full pipeline folder")
        distinct = list(dict.fromkeys(prompts))
        encoded = self.text_encoder(distinct)
        if len(distinct) == len(prompts):
            return encoded
        row = {prompt: index for index, prompt in enumerate(distinct)}
        return encoded.select([row[prompt] for prompt in prompts])

    def drop_text_taps(self) -> None:
        """Read no text tokens from now on, for a head that takes none; what only they needed stops training.

        DDP would wait for the gradients of such parameters.
        """

    def drop_time_embedding(self) -> None:
        """Stop training what only the timestep embedding among the features needs, for a head that takes none."""

    def with_network(self, network: nn.Module, text_encoder: PromptEncoder | None) -> DiffusionBackbone | None:
        """The same taps on ``network``, of which no block is dropped, without a VAE; None if this class cannot.

        Args:
            network: Whole diffusers network of the same config, which others use too.
            text_encoder: Encoder of prompts for it.
        """
        return None

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The kept blocks of the network, in order: what is compiled, checkpointed or sharded one by one."""


def rows_of(features: Features, rows: slice) -> Features:
    """Part of a batch of features."""
    return map_tensors(features, lambda tensor: tensor[rows])


def check_features(features: Features, spec: FeatureSpec, backbone: str) -> None:
    """Compare what a backbone read with what its ``feature_spec`` says.

    Raises:
        InputError: Naming the first tap of another number, width or grid.
    """
    for kind, taps, promised in (("visual", features.visual, spec.visual), ("text", features.text, spec.text)):
        if len(taps) != len(promised):
            raise InputError(
                f"{backbone}: read gives {len(taps)} {kind} taps, but feature_spec has {len(promised)}; let them agree"
            )
        for index, (tap, expected) in enumerate(zip(taps, promised, strict=True)):
            if tap.shape[-1] != expected.width:
                raise InputError(
                    f"{backbone}: read gives {kind} tap {index} with {tap.shape[-1]} features per token, but "
                    f"feature_spec says {expected.width}; let them agree"
                )
    for index, (tap, grid) in enumerate(zip(features.visual, features.visual_grids, strict=True)):
        if tap.shape[1] != math.prod(grid):
            raise InputError(f"{backbone}: visual tap {index} has {tap.shape[1]} tokens for the grid {tuple(grid)}")
    for name, vector, width in (
        ("temb", features.temb, spec.temb_dim),
        ("pooled_text", features.pooled_text, spec.pooled_text_dim),
    ):
        if vector.shape[-1] != width:
            raise InputError(
                f"{backbone}: read gives {name} with {vector.shape[-1]} features, but feature_spec says {width}; let "
                "them agree"
            )


def check_taps(name: str, taps: Sequence[int], last: int, least: int = 0) -> tuple[int, ...]:
    """Ascending block numbers 0..``last`` (0 is before the first block).

    Raises:
        InputError: If fewer than ``least`` taps are given, they do not ascend, or one lies past the blocks.
    """
    taps = tuple(taps)
    if len(taps) < least:
        raise InputError(f"{name}={list(taps)} is empty; name at least one block from 0 to {last}")
    if list(taps) != sorted(set(taps)):
        raise InputError(f"{name}={list(taps)} must ascend without repeats")
    outside = [tap for tap in taps if not 0 <= tap <= last]
    if outside:
        raise InputError(
            f"{name}={list(taps)} reaches block {outside[-1]}, but this network has blocks 1 to {last} (0 reads before "
            "the first one)"
        )
    return taps
