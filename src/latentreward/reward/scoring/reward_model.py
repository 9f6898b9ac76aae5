"""The reward model that users load, score images and latents with, and save: a backbone joined with a head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, check_sources, sources_of
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.running import find_device
from latentreward.data.image_sizes import PUBLISHED_BUCKETS, ImageSizes, NearestBucket, OneSize
from latentreward.data.images import ExifOrientation
from latentreward.diffusion import DiffusionBackbone, FlowMatching
from latentreward.diffusion.encoders.prompts import empty_prompts, encode_texts
from latentreward.reward.heads.base import AXES, RewardHead
from latentreward.reward.scoring.ensemble import (
    EncodedBatch,
    ImageInput,
    Images,
    PromptMemory,
    as_images,
    check_floating,
    check_frames,
    head_scores,
    prompt_of_each,
    score_given_latents,
    score_images,
    score_parts,
)
from latentreward.reward.scoring.find import ModelSource, find_reward, name_of
from latentreward.reward.scoring.precision import halve_products, product_weights
from latentreward.reward.scoring.scoring_noise import Calibration, ScoringNoise

if TYPE_CHECKING:
    from latentreward.reward.scoring.publishing import Card
    from latentreward.reward.scoring.recipe import ModelRecipe

logger = logging.getLogger(__name__)

PUBLISHED_SIDE = 1024  # native side, in pixels, of the network for which DiNa-LRM's buckets were published
MOSTLY_NOISE, WIDEST_NOISE = 0.9, 3.0
"""Noise level from which states have about the spread of noise, and the largest such spread without a warning."""


class RewardModel(nn.Module):
    """Reward model that scores images or latents for prompts, at its noise levels or at given ones.

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
        self.source, self.dtype = "", torch.float32
        self.calibration: Calibration | None = None
        self.recipe: ModelRecipe | None = None
        self.published: dict[str, Any] = {}
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | ModelSource,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """Load a reward model, frozen and in evaluation mode.

        Args:
            source: Path or hub id of the model, as for :class:`~latentreward.reward.ModelSource`, or that record.
            device: Device of the model, e.g. ``cuda``; ``auto`` takes an accelerator if there is one.
            dtype: Precision of the backbone; head and scores are always float32.
            options: ``config``, ``base``, ``revision``, ``trust_remote_code`` and ``published``: see
                :class:`~latentreward.reward.ModelSource`. Values of ``published`` in use are logged, and appear in
                :attr:`published` and :attr:`identity`.
        """
        target = find_device(device)
        source = source if isinstance(source, ModelSource) else ModelSource(str(source), **options)
        model = find_reward(source).load(cls).to(target).set_precision(dtype)
        model.source = str(source)
        return model

    def save_pretrained(self, folder: str | Path, card: Card | None = None, *, base: str | None = None) -> None:
        """Write the trained weights, settings and model card into a folder that :meth:`from_pretrained` loads.

        The loaded model gives bitwise equal scores. The folder is written under a temporary name and renamed when it is
        complete. Its files are described in :mod:`~latentreward.reward.scoring.stored`.

        Args:
            folder: Folder to create. An empty folder or a model folder of that name is replaced.
            card: Contents of the model card that the model itself does not know, e.g. the licence.
            base: Name under which others find the pretrained pipeline, e.g. a hub id (``owner/name@revision``). None
                keeps the hub id, or takes the last part of a local path; whoever loads the model must then pass
                ``base=`` a local copy.
        """
        from latentreward.reward.scoring.publishing import Card, new_folder, write_model

        with new_folder(Path(folder)) as partial:
            write_model(self, partial, card or Card(), base, Path(folder).resolve().name)

    def score(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Images,
        *,
        noise: ScoringNoise | None = None,
        **options: Any,
    ) -> Tensor:
        """Score N images, image i for prompt i; returns ``(N,)``, float32 on the CPU.

        A score depends on the rest of the batch and on the order of images only by rounding (about 2e-5 on a CPU in
        float32; bitwise equal in batches of equal shape). Prompts are encoded one at a time, and the noise is seeded
        with prompt, seed, noise level and shape of the latents. Gradients flow back if ``images`` is a tensor that
        requires a gradient. Empty lists give an empty tensor.

        Args:
            prompts: N prompts, or a single text for all images. Of edits, prompts with the pictures that were edited,
                as :func:`~latentreward.reward.edit_prompt` makes them.
            images: N images of any size: PIL images of any mode, paths, encoded bytes, ``ImageRef`` or uint8 arrays
                ``(H, W, 3)``, also as one array ``(N, H, W, 3)``. Their EXIF orientation is applied if ``exif`` is
                ``apply``, and ``image_sizes`` resizes each. Or a floating point tensor ``(N, 3, H, W)``, which is
                scored at its own size; for a model trained on clips ``(N, 3, F, H, W)``. A single image (``(3, H, W)``
                as a tensor) gives one score, ``(1,)``.
            noise: Noise levels and seeds; None takes those of the model.
            options: ``batch_size``, ``value_range``, ``axes`` and ``memory``: see :meth:`score_levels`.
        """
        return self.score_levels(prompts, images, [self.noise if noise is None else noise], **options)[:, 0]

    def score_levels(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Images,
        levels: Sequence[ScoringNoise],
        *,
        batch_size: int = 8,
        value_range: tuple[float, float] | None = None,
        axes: bool = False,
        memory: PromptMemory | None = None,
    ) -> Tensor:
        """Score N images under each of K noise settings; returns ``(N, K)``, float32 on the CPU.

        Each image is encoded only once for all settings. Without images the result is empty, ``(0, K)``.

        Args:
            prompts: See :meth:`score`.
            images: See :meth:`score`.
            levels: K noise settings.
            batch_size: Largest number of images per forward pass; a batch holds images of one size.
            value_range: Lowest and highest value of a tensor's pixels, e.g. ``(0, 1)``. None takes (-1, 1) and warns if
                all values lie in [0, 1].
            axes: Whether to return fidelity and aesthetics, with a last axis of 2, in place of their weighted sum; only
                for a model whose head has these two outputs.
            memory: Encoded prompts of earlier calls, made by :meth:`prompt_memory`; None keeps none between calls.
        """
        self._check_options(batch_size, axes)
        given = as_images(images, value_range)
        texts = prompt_of_each(prompts, len(given))
        check_frames(given, self.image_sizes)
        pixels = given.detach() if isinstance(given, Tensor) and value_range is None else torch.zeros(0)
        if pixels.numel() and pixels.min() >= 0 and pixels.max() <= 1:
            doubt = "all values of the image tensor lie in [0, 1], but [-1, 1] is expected"
            self.warn_once("range", f"{doubt}; give value_range=(0, 1), or value_range=(-1, 1) if they are right")
        self._check_prompts(texts)
        outputs = score_images(self, texts, given, levels, batch_size, memory)
        return outputs if axes else self.head.total(outputs)

    def _check_options(self, batch_size: int | None, axes: bool) -> None:
        check_at_least_one(batch_size=batch_size)
        if axes and not self.axes:
            raise InputError(f"axes=True, but {type(self.head).__name__} has no two axes; train it with `axes` set")

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        check_sources(f"reward {self.source}".strip(), prompts, self.backbone.sources)

    def score_latents(
        self,
        prompts: str | Sequence[str],
        latents: Tensor,
        *,
        noise: ScoringNoise | None = None,
        draws: Tensor | None = None,
        conditioning: tuple[Conditioning, Conditioning | None] | None = None,
        batch_size: int | None = None,
        axes: bool = False,
    ) -> Tensor:
        """Add noise to N clean latents and score them, latent i for prompt i; returns ``(N,)``, at least float32.

        Gradients flow back if ``latents`` requires a gradient; otherwise no autograd graph is built. No latents give an
        empty tensor.

        Args:
            prompts: N prompts, or a single text for all; with ``conditioning`` they only seed the noise.
            latents: ``(N, C, ...)`` clean, scaled latents of any spatial shape that the network takes.
            noise: Noise levels and seeds; None takes those of the model.
            draws: ``(N, C, ...)`` noise to add at every level in place of seeded noise, as the released DiNa-LRM does
                in an ensemble; zeros add no noise, and only the noise process's scale is applied.
            conditioning: N encoded prompts, and the encoded empty prompt in one row (with None it is encoded here if
                the head needs it).
            batch_size: Largest number of latents per forward pass; None takes all at once.
            axes: As in :meth:`score_levels`.
        """
        self._check_options(batch_size, axes)
        check_floating("latents", latents, 3, "(N, C, ...)")
        if draws is not None and draws.shape != latents.shape:
            shapes = f"{tuple(draws.shape)}, but latents {tuple(latents.shape)}"
            raise InputError(f"draws have shape {shapes}; give as many numbers as the latents have")
        texts = self._check_conditioning(prompts, len(latents), conditioning)
        size, noise = batch_size or max(len(latents), 1), noise or self.noise
        outputs = score_given_latents(self, texts, latents, noise, draws, conditioning, size)
        return outputs if axes else self.head.total(outputs)

    def score_states(
        self,
        prompts: str | Sequence[str],
        latents: Tensor,
        timesteps: Tensor,
        *,
        conditioning: tuple[Conditioning, Conditioning | None] | None = None,
        batch_size: int | None = None,
        axes: bool = False,
    ) -> Tensor:
        """Score the S noisy states of each of N trajectories, trajectory i for prompt i; no noise is added.

        Gradients and empty input are as in :meth:`score_latents`. A prompt is encoded once for all its states.

        Args:
            prompts: N prompts, or a single text for all; with ``conditioning`` they only name a state in messages.
            latents: ``(N, S, C, ...)`` scaled states of the model's own noise process; see
                :func:`~latentreward.alignment.rewards.latent.convert_states` for states of another.
            timesteps: ``(N, S)``, or ``(S,)`` for all trajectories, of the model's noise process; in flow matching
                1000 times the noise level.
            conditioning: As in :meth:`score_latents`.
            batch_size: Largest number of states per forward pass; None takes all at once.
            axes: As in :meth:`score_levels`; the result has a last axis of 2.

        Returns:
            Scores ``(N, S)``, at least float32.
        """
        self._check_options(batch_size, axes)
        check_floating("latents", latents, 4, "(N, S, C, ...)")
        timesteps = torch.as_tensor(timesteps)
        count, steps = latents.shape[:2]
        if tuple(timesteps.shape) not in ((steps,), (count, steps)):
            given = f"timesteps have shape {tuple(timesteps.shape)} for {count} trajectories of {steps} states"
            raise InputError(f"{given}; give ({steps},) for all of them, or ({count}, {steps})")
        times = timesteps.to(torch.float32).expand(count, steps)
        sigmas = self.backbone.noise_process.sigma(times.flatten())  # raises for a timestep out of range
        if times.numel() and times.max() <= 1 and times.frac().any():
            doubt = "all timesteps lie in [0, 1], as noise levels do; in flow matching give 1000 times the level"
            self.warn_once("timesteps", doubt)
        noisy = latents.detach().flatten(0, 1)[sigmas.to(latents.device) >= MOSTLY_NOISE]
        if noisy.numel() and (spread := noisy.float().std().item()) > WIDEST_NOISE:
            self.warn_once(
                "states",
                f"states that are mostly noise have standard deviation {spread:.1f}, where this noise process has 1; "
                "divide states of diffusers' Euler schedulers (x + σ·ε) by √(σ² + 1), as their scale_model_input does",
            )
        texts = self._check_conditioning(prompts, count, conditioning)
        flat_times, rows = times.flatten().to(self.device), [state // steps for state in range(count * steps)]

        def score(batch: EncodedBatch, part: slice) -> Tensor:
            return head_scores(self, [batch.features(self, batch.latents, flat_times[part])], len(batch.latents))

        size = batch_size or max(count * steps, 1)
        flat = score_parts(self, texts, rows, latents.flatten(0, 1), conditioning, size, score)
        outputs = flat.unflatten(0, (count, steps))
        return outputs if axes else self.head.total(outputs)

    def _check_conditioning(
        self, prompts: str | Sequence[str], count: int, given: tuple[Conditioning, Conditioning | None] | None
    ) -> Sequence[str]:
        """Check prompts and their given encoded form, and return one prompt for each of ``count`` rows."""
        if given is not None and len(given[0]) != count:
            raise InputError(f"conditioning has {len(given[0])} rows for {count} latents; give one row for each")
        masked = getattr(self.backbone.text_encoder, "masked", False)
        if given is not None and given[0].prompt_mask is None and masked:
            raise InputError("conditioning has no prompt_mask; tell which tokens belong to each prompt")
        texts = prompt_of_each(prompts, count)
        if given is None:
            self._check_prompts(texts)
        return texts

    def prompt_memory(self, count: int) -> PromptMemory:
        """Return an empty memory of ``count`` encoded prompts, which stays valid while the text encoder is frozen.

        An encoded prompt of SD3 takes 5 MB on the model's device.
        """
        check_at_least_one(count=count)
        return PromptMemory(self, count)

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

        For the dtypes see :mod:`~latentreward.reward.scoring.precision`. Parts of the backbone whose names are in
        ``kept``, which another model shares, stay as they are.
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
        """Move the model to a device; refuse a cast, after which :attr:`dtype` and saved weights would be wrong."""
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
        return ", ".join([*parts, str(self.dtype).removeprefix("torch.")])

    def encode_images(self, pixels: Tensor, noise: Tensor | None = None, *, differentiable: bool = False) -> Tensor:
        """Encode ``pixels`` ``(B, 3, ...)`` in [-1, 1] into scaled latents; see ``LatentEncoder.encode``."""
        if self.backbone.vae is None:
            raise InputError("pixels were given, but this backbone has no VAE; give latents, or a full base pipeline")
        return self.backbone.vae.encode(pixels, noise, differentiable=differentiable)

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
        encoded = backbone.encode_prompts([*prompts, ""])
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
        return self.head.total(self.head(self.backbone(noisy_latents, timesteps, conditioning, uncond)))


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


def normalise_score(raw: Tensor) -> Tensor:
    """Convert raw scores to the scale on which DiNa-LRM reports them: ``(raw + 10) / 10``."""
    return (torch.as_tensor(raw) + 10) / 10
