"""Module that joins a backbone and a head: noisy latents and a prompt in, a score out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features, sources_of
from latentreward.core.errors import InputError
from latentreward.data.image_sizes import PUBLISHED_BUCKETS, ImageSizes, NearestBucket, OneSize
from latentreward.data.images import ExifOrientation
from latentreward.diffusion import DiffusionBackbone, FlowMatching
from latentreward.diffusion.encoders.prompts import empty_prompts, encode_texts
from latentreward.reward.heads.base import AXES, RewardHead
from latentreward.reward.scoring.layouts.recipe import ModelRecipe
from latentreward.reward.scoring.scoring_noise import Calibration, ScoringNoise

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.vae import LatentEncoder

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
EXACT = re.compile(
    r"(^|\.)(time_\w+|[tp]_embedder|add_embedding|\w+_modulation(_\w+)?|(img|txt)_mod|norm(\d|_out)?(_context)?"
    r"|distilled_guidance_layer|pos_embed|(all_)?x_embedder|patch_embedding|img_in|context_embedder|cap_embedder"
    r"|text_embedder|text_proj|txt_in|caption_projection|projector|t_embedding|adaln_proj|input_proj|llm_cond_proj"
    r")(\.|$)"
)
"""Names of layers that stay float32: those of time embedding and modulation, which are cheap (one vector per image) and
affect all tokens, and a transformer's patch and text embeddings."""
ATTENTION = re.compile(r"(?<!\.block\.attn1)\.(to_[qkv]|to_qkv_mlp_proj|add_[qkv]_proj)(\.|$)")
"""Names of query, key and value layers; on an accelerator their outputs stay bfloat16, which fused attention takes.

HiDream's attention gives queries and keys the type of the residual stream, so its values must have it too.
"""
ATTENTION_NORM = re.compile(r"\.norm_(added_)?[qk]$")  # names of the norms of queries and keys


def product_weights(network: nn.Module) -> set[int]:
    """Return the ids of the tensors that :func:`halve_products` converts to bfloat16."""
    return {
        id(tensor)
        for name, module in network.named_modules()
        if is_halved(name, module)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if tensor.is_floating_point()
    }


def is_halved(name: str, module: nn.Module) -> bool:
    """Tell whether :func:`halve_products` converts a layer to bfloat16."""
    return isinstance(module, PRODUCTS) and not EXACT.search(name)


def halve_products(network: nn.Module) -> None:
    """Convert the linear and convolution layers of ``network`` to bfloat16 and all else to float32, in place.

    Hooks cast the input of each converted layer to bfloat16 and its output to float32. Layers with names in
    :data:`EXACT` stay float32. Attention is computed in float32 on a CPU, and in bfloat16 on an accelerator.
    """
    halved = product_weights(network)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16 if id(tensor) in halved else torch.float32)
    for name, module in network.named_modules():
        if is_halved(name, module):
            module.register_forward_pre_hook(partial(_cast_input, torch.bfloat16))
            elsewhere = None if ATTENTION.search(name) else torch.float32
            module.register_forward_hook(partial(_cast_output, torch.float32, elsewhere))
        elif isinstance(module, PRODUCTS):
            module.register_forward_pre_hook(partial(_cast_input, torch.float32))
        elif ATTENTION_NORM.search(name):
            module.register_forward_hook(partial(_cast_output, None, torch.bfloat16))


def _cast_input(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].to(dtype), *inputs[1:]


def _cast_output(
    on_cpu: torch.dtype | None, elsewhere: torch.dtype | None, module: nn.Module, inputs: Any, output: Tensor
) -> Tensor:
    """Cast the output of a layer to the dtype for its device; None leaves it as it is."""
    dtype = on_cpu if output.device.type == "cpu" else elsewhere
    return output if dtype is None else output.to(dtype)


logger = logging.getLogger(__name__)

PUBLISHED_SIDE = 1024  # native side, in pixels, of the network for which DiNa-LRM's buckets were published


class RewardNetwork(nn.Module):
    """Network that scores latents at any noise level, with the settings that scoring images needs.

    Args:
        backbone: Network that computes features from noisy latents.
        head: Network that computes scores from features.

    Attributes:
        noise: Default noise levels and seeds of a score: timestep 1 for DDPM (LRM on clean images), noise level 0.4 for
            flow matching (DiNa-LRM's published example).
        image_sizes: Rule by which images are resized: that of the training, see :class:`RewardModule`; by default that
            of :func:`own_sizes`. None if the backbone's native size is unknown.
        exif: Whether images are turned upright by their EXIF orientation (``apply`` or ``ignore``), as in training.
        edits: Whether the training's images were edits of pictures; None if that is not known.
        source: Path or hub id that the model was loaded from, as the user gave it.
        dtype: Precision of the backbone's matrix products; see :meth:`set_precision`. Casts such as ``half`` or
            ``to(torch.bfloat16)`` are refused.
        calibration: Mean and quantiles of scores on a reference set; None if the model was not calibrated.
        recipe: Record from which the model is built again when it is loaded; None for a model built in Python.
        published: Settings in use that the files of a published layout do not hold; empty for any other model.
    """

    def __init__(self, backbone: DiffusionBackbone, head: RewardHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        flow = isinstance(backbone.noise_process, FlowMatching)
        self.noise = ScoringNoise(sigmas=(0.4,)) if flow else ScoringNoise(timesteps=(1.0,))
        self.image_sizes: ImageSizes | None = own_sizes(backbone)
        self.exif: ExifOrientation = "apply"
        self.edits: bool | None = None
        self.source = ""
        self.dtype = torch.float32
        self.calibration: Calibration | None = None
        self.recipe: ModelRecipe | None = None
        self.published: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._compared = False

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the two outputs of a head with axes; empty for a head with one score."""
        return () if self.head.axis_weights is None else AXES

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def set_precision(self, dtype: torch.dtype, kept: Container[str] = ()) -> Self:
        """Set the precision of the backbone, and return the model; VAE, head and scores are always float32.

        For the dtypes see :mod:`~latentreward.reward.scoring.network`. Parts of the backbone whose names are in
        ``kept``, which another model shares, stay as they are.

        Raises:
            InputError: If ``dtype`` is another type, or the model is bfloat16 already and ``dtype`` is not.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"dtype is {dtype}; a reward model scores in torch.float32 or torch.bfloat16")
        if self.dtype == torch.bfloat16:
            if dtype != self.dtype:
                raise InputError("the model's weights were rounded to bfloat16; load the model again for float32")
            return self
        halved = [*self._halved_parts(kept)] if dtype == torch.bfloat16 else []
        for name, part in self.backbone.named_children():
            if part in halved:
                halve_products(part)
            elif name not in kept:
                nn.Module.float(part)  # frozen weights may be stored in bfloat16
        self.head.float()
        self.dtype = dtype
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the model to another device; refuse a cast, after which :attr:`dtype` and saved weights would be wrong.

        Raises:
            InputError: If ``fn`` changes the type of a weight, as ``to(torch.bfloat16)``, ``half`` and ``double`` do.
        """
        for dtype, device in {(tensor.dtype, tensor.device) for tensor in (*self.parameters(), *self.buffers())}:
            found = fn(torch.empty(1, dtype=dtype, device=device)).dtype  # before any weight has changed
            if found != dtype:
                remedy = "load it with dtype=torch.bfloat16 or torch.float32 in from_pretrained"
                raise InputError(f"a reward model is not cast (here from {dtype} to {found}); {remedy}")
        return super()._apply(fn, recurse)

    def halved_weights(self, kept: Container[str] = ()) -> set[int]:
        """Return the ids of the weights that :meth:`set_precision` rounds to bfloat16."""
        return {key for part in self._halved_parts(kept) for key in product_weights(part)}

    def _halved_parts(self, kept: Container[str]) -> Iterator[nn.Module]:
        """Yield the parts of the backbone whose products are computed in bfloat16."""
        return (part for name, part in self.backbone.named_children() if name != "vae" and name not in kept)

    def warn_once(self, kind: str, message: str) -> None:
        """Log a warning, unless a warning of this ``kind`` was logged for this model before."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s (further ones are not logged)", message)

    def require_images(self, reader: str) -> None:
        """Raise InputError if the model was trained on clips, which ``reader`` does not take."""
        if self.image_sizes is not None and self.image_sizes.frames > 1:
            raise InputError(
                f"model: {self.source or 'the reward'} was trained on clips of {self.image_sizes.frames} frames, but "
                f"{reader} takes images; score clips by `latentreward score`, or give a reward for images"
            )

    @property
    def identity(self) -> str:
        """Line that names all that the scores depend on: source, base, settings, noise, sizes, EXIF and precision.

        Scores with different identities are not comparable. Local paths appear as their last part only.
        """
        base = name_of(self.backbone.source or "a network given")
        parts = [name_of(self.source or type(self.head).__name__), f"on {base}"]
        parts += [f"{name} {value}" for name, value in self.published.items()]
        parts += [f"at {self.noise}", f"images {self.image_sizes}", f"exif {self.exif}"]
        parts += [str(self.dtype).removeprefix("torch.")]
        return ", ".join(parts)

    def encode_images(self, pixels: Tensor, noise: Tensor | None = None, *, differentiable: bool = False) -> Tensor:
        """Encode ``pixels`` ``(B, 3, ...)`` in [-1, 1] into scaled latents; see ``LatentEncoder.encode``.

        Raises:
            InputError: If the backbone has no VAE.
        """
        return self._vae().encode(pixels, noise, differentiable=differentiable)

    def latent_shape(self, pixels: Tensor) -> tuple[int, ...]:
        """Return the shape of the latents of one image of ``pixels``, without the batch axis."""
        return self._vae().latent_shape(pixels)

    def _vae(self) -> LatentEncoder:
        if self.backbone.vae is None:
            raise InputError("pixels were given, but this backbone has no VAE; give latents, or a full base pipeline")
        return self.backbone.vae

    def encode_prompts(
        self, prompts: Sequence[str], sources: Sequence[Tensor] = (), latents: bool = False
    ) -> tuple[Conditioning, Conditioning | None]:
        """Encode prompts to B rows, and the empty prompt if the head needs it (None otherwise).

        ``sources`` and ``latents`` are as those of :meth:`DiffusionBackbone.encode_prompts`. The empty prompt is one
        row; it is B rows where the text encoder sees the pictures that the prompts edit.
        """
        backbone = self.backbone
        if not self.head.needs_uncond:
            return backbone.encode_prompts(prompts, sources, latents), None
        if any(map(sources_of, prompts)):
            encoded, encoder = backbone.encode_prompts(prompts, sources, latents), backbone.text_encoder
            assert encoder is not None
            return encoded, encode_texts(encoder, empty_prompts(encoder, prompts))
        encoded = self.backbone.encode_prompts([*prompts, ""])
        return encoded.select(range(len(prompts))), encoded.select([len(prompts)])

    def take_prompts(
        self, conditioning: Conditioning, uncond: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Convert cached encoded prompts to the network's dtype.

        The empty prompt is dropped if the head does not need it, and encoded here if it is needed but None.
        """
        dtype = next(next(self.backbone.blocks()).parameters()).dtype
        if not self.head.needs_uncond:
            return conditioning.to(dtype), None
        return conditioning.to(dtype), (self.backbone.encode_prompts([""]) if uncond is None else uncond).to(dtype)

    def read(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, uncond: Conditioning | None = None
    ) -> Features:
        """Compute the features of ``noisy_latents`` ``(B, C, ...)`` at ``timesteps`` ``(B,)``.

        In the first batch a user's own backbone and head are checked: each row must give what it gives alone
        (:func:`~latentreward.reward.scoring.apart.check_apart`).
        """
        if not self._compared and len(noisy_latents) > 1:
            from latentreward.reward.scoring.apart import check_apart  # only a model that runs needs it

            check_apart(self.backbone, self.head, noisy_latents, timesteps, conditioning, uncond)
            self._compared = True
        return self.backbone(noisy_latents, timesteps, conditioning, uncond)

    def forward(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, uncond: Conditioning | None = None
    ) -> Tensor:
        """Score noisy latents; no noise is added here.

        Args:
            noisy_latents: ``(B, C, ...)`` latents with the noise of ``timesteps``.
            timesteps: ``(B,)`` timesteps of the backbone's noise process.
            conditioning: Encoded prompts, B rows.
            uncond: Encoded empty prompt, one row; needed if the head's ``needs_uncond`` is true.

        Returns:
            Scores ``(B,)``, for a head with two axes their weighted sum; ``(B, out_dim)`` for one with other outputs.
        """
        return self.head.total(self.head(self.read(noisy_latents, timesteps, conditioning, uncond)))


def name_of(source: str) -> str:
    """Return the last part of a local path; a hub id is returned unchanged."""
    path = Path(source)
    # os.path.exists returns False for a name that is too long for a file; pathlib's exists raises.
    return path.absolute().name if path.is_absolute() or os.path.exists(source) else source  # noqa: PTH110


def own_sizes(backbone: DiffusionBackbone) -> ImageSizes | None:
    """Return the default rule for a backbone's image sizes; None if its native size is unknown.

    A network trained on one aspect ratio gets :class:`OneSize` with its native size. Any other network gets DiNa-LRM's
    buckets, scaled from 1024 pixels to the network's native side and rounded to multiples of ``side_multiple``; buckets
    that become equal are merged.
    """
    if backbone.native_size is None:
        return None
    if not backbone.takes_aspects:
        return OneSize(*backbone.native_size)
    scale, multiple = max(backbone.native_size) / PUBLISHED_SIDE, backbone.side_multiple
    sizes = [tuple(max(round(side * scale / multiple), 1) * multiple for side in size) for size in PUBLISHED_BUCKETS]
    return NearestBucket(tuple(dict.fromkeys(sizes)))  # type: ignore[arg-type]
