"""Scores of images or latents in batches: the ensemble over noise levels, and the mean over seeds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import Conditioning, EditPrompt, Features, ImageRef, seen_as, sources_of
from latentreward.core.errors import InputError, check_multiples
from latentreward.core.storage.digests import digest
from latentreward.data import PixelLoader, decode_image
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation, convert_image, map_ahead, png
from latentreward.diffusion.backbones.base import rows_of
from latentreward.diffusion.encoders.prompts import empty_prompts
from latentreward.reward.scoring.scoring_noise import ScoringNoise, draw_noise, timesteps_of

if TYPE_CHECKING:
    from latentreward.reward.scoring.reward_model import RewardModel

ImageInput = Image.Image | str | Path | bytes | ImageRef | np.ndarray
"""Type of one image: a PIL image, a path, encoded bytes, a reader's reference, or a uint8 array ``(H, W, 3)``."""
Images = Sequence[ImageInput] | Tensor
Item = TypeVar("Item")
FORMS = "a PIL image, a path, encoded bytes, an ImageRef or a uint8 array (H, W, 3)"
LARGEST_PIXEL = 4.0
"""Largest magnitude of pixels accepted as lying in [-1, 1]; VAE decoders overshoot that range by some tenths."""
ROWS = 4
"""Number of rows of which a batch on a CPU holds a multiple: :func:`even_parts`.

Widths of features are multiples of 8 and CPU vectors hold at most 32 numbers, so that 4 rows fill them evenly.
"""
PROMPTS_KEPT = 32  # number of encoded prompts that are kept for later batches; an encoded prompt of SD3 takes 5 MB


def even_parts(count: int, size: int, step: int) -> Iterator[slice]:
    """Yield slices of up to ``size`` rows that cover ``count`` rows: multiples of ``step`` rows, the rest singly.

    On a CPU, vectorised kernels handle the last few numbers of an array with different instructions. In a batch of 3
    rows the last bits of a score therefore depend on the row; with a multiple of 4 rows, arrays have no such rest.
    """
    start = 0
    while start < count:
        rows = min(size, count - start)
        stop = start + (rows - rows % step or 1)
        yield slice(start, stop)
        start = stop


def as_images(images: ImageInput | Images, value_range: tuple[float, float] | None = None) -> Images:
    """Return images as a list; a tensor as pixels ``(N, 3, H, W)``, or of clips ``(N, 3, F, H, W)``, in [-1, 1].

    For the arguments see :meth:`~latentreward.reward.RewardModel.score`; a single image becomes a list of one.
    """
    if isinstance(images, Tensor):
        return as_pixels(images, value_range)
    if isinstance(images, Image.Image | str | Path | bytes | ImageRef):
        return [images]
    if isinstance(images, np.ndarray):
        return [images] if images.ndim == 3 else list(images)
    return images


def as_pixels(images: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Convert pixels in ``value_range`` to ``(N, 3, H, W)``, or of clips to ``(N, 3, F, H, W)``, in [-1, 1].

    Floating point ``images`` are ``(N, 3, H, W)``, ``(3, H, W)`` or ``(N, 3, F, H, W)``.
    """
    pixels = images[None] if images.ndim == 3 else images
    if pixels.ndim not in (4, 5) or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise InputError(
            f"images are a {images.dtype} tensor of shape {tuple(images.shape)}; give floating point (N, 3, H, W) in "
            "[-1, 1], or in the value_range that you name, uint8 arrays (N, H, W, 3), or latents to score_latents"
        )
    if value_range is not None and value_range != (-1, 1):
        low, high = value_range
        pixels = (pixels - low) * (2 / (high - low)) - 1
    if pixels.numel() and pixels.detach().abs().max().item() > LARGEST_PIXEL:
        within = "in [-1, 1]" if value_range is None else f"within value_range={value_range}"
        raise InputError(
            f"images hold a pixel of magnitude {images.detach().abs().max().item():g}, not {within}; scale them to "
            "[-1, 1], or name the range that they have as value_range"
        )
    return pixels


def check_frames(images: Images, sizes: ImageSizes | None) -> None:
    """Check that a model trained on images gets images, and one trained on clips gets clips of as many frames."""
    given = images.shape[2] if isinstance(images, Tensor) and images.ndim == 5 else 1
    if sizes is not None and len(images) and given != sizes.frames:
        form = f"a tensor (N, 3, {sizes.frames}, H, W)" if sizes.frames > 1 else "images"
        raise InputError(f"images have {given} frames, but the model was trained on {sizes.frames}; give {form}")


def check_floating(name: str, tensor: Tensor, axes: int, form: str) -> None:
    """Raise InputError if a tensor has other numbers than floating point, or fewer axes."""
    if tensor.ndim < axes or not tensor.is_floating_point():
        shape = tuple(tensor.shape)
        raise InputError(f"{name} are a {tensor.dtype} tensor of shape {shape}; give floating point {form}")


def pixel_batches(
    images: Images,
    sizes: ImageSizes | None,
    batch_size: int,
    step: int = 1,
    exif: ExifOrientation = "apply",
    groups: Sequence[Any] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of images of one size, each as soon as it is full; incomplete batches come last.

    A batch is the index of each of its B images among all images, and the pixels ``(B, 3, H, W)``, or of clips
    ``(B, 3, F, H, W)``, in [-1, 1].
    Images are decoded, turned upright if ``exif`` says so, and resized; pixels are only cut into batches. For ``step``
    see :func:`even_parts`. A batch holds images of one group only, if ``groups`` names that of each image.
    """
    if isinstance(images, Tensor):
        for part in even_parts(len(images), batch_size, step):
            yield [*range(part.start, part.stop)], images[part]
        return
    if sizes is None:
        raise InputError("this model does not tell its image size; set its image_sizes, e.g. OneSize(512, 512)")

    def load(item: tuple[int, Any]) -> Tensor:
        decoded = decode_any(item[1], item[0], exif)
        return sizes.loader(decoded.height, decoded.width).pixels(decoded)

    loaded = enumerate(map_ahead(load, enumerate(images), batch_size))
    kinds = (((pixels.shape, groups and groups[row]), (row, pixels)) for row, pixels in loaded)
    for batch in by_kind(kinds, batch_size):
        for part in even_parts(len(batch), len(batch), step):
            rows, pixels = zip(*batch[part], strict=True)
            yield [*rows], torch.stack(pixels)


def by_kind(items: Iterable[tuple[Any, Item]], size: int) -> Iterator[list[Item]]:
    """Yield items of one kind, from pairs of kind and item: ``size`` items as soon as they are there, the rest last."""
    waiting: dict[Any, list[Item]] = {}
    for kind, item in items:
        group = waiting.setdefault(kind, [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(kind)
    yield from waiting.values()


def edit_prompt(text: str, sources: ImageInput | Sequence[ImageInput]) -> EditPrompt:
    """Return the prompt of an edit: the instruction, and the picture or pictures that were edited.

    Pictures that are no files and no ``ImageRef`` are kept as PNG, and named by their content.
    """
    if isinstance(sources, str | Path | bytes | ImageRef | Image.Image | np.ndarray):
        sources = [sources]
    return EditPrompt(text, [source_ref(source, number) for number, source in enumerate(sources)])


def source_ref(source: ImageInput, number: int) -> ImageRef:
    """Return a reference to a picture that was edited, see :func:`edit_prompt`; ``number`` names it in messages."""
    if isinstance(source, ImageRef):
        return source
    if isinstance(source, str | Path):
        return ImageRef(str(source), path=Path(source))
    data = source if isinstance(source, bytes) else png(decode_any(source, number, "ignore"))
    return ImageRef(digest([data], 64), data=data)


def decode_any(image: Any, row: int, exif: ExifOrientation) -> Image.Image:
    """Decode one image of any type in :data:`ImageInput` to 8-bit RGB."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            remedy = "give uint8 (H, W, 3), or a tensor (N, 3, H, W) with its value_range"
            raise InputError(f"image number {row} is a {image.dtype} array of shape {image.shape}; {remedy}")
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        if image.mode == "F" and 0 < (most := image.getextrema()[1]) <= 1:
            problem = f"image number {row} has mode F, of which 255 is white, and no value above {most:g}"
            raise InputError(f"{problem}; multiply it by 255, or give a tensor with value_range=(0, 1)")
        return convert_image(image, f"number {row}", exif=exif)
    if isinstance(image, bytes):
        image = ImageRef(f"number {row}", data=image)
    if isinstance(image, str | Path):
        image = ImageRef(str(image), path=Path(image))
    if isinstance(image, ImageRef):
        return decode_image(image, exif=exif)
    raise InputError(f"image number {row} is a {type(image).__name__}; give {FORMS}")


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded images and prompts of one batch."""

    latents: Tensor  # ``(B, C, ...)`` clean, scaled latents
    prompts: Sequence[str]  # B prompts, which seed the noise
    conditioning: Conditioning  # encoded prompts, B rows
    uncond: Conditioning | None  # encoded empty prompt, one row; None if the head does not need it
    draws: Tensor | None = None  # ``(B, C, ...)`` noise to add at all levels in place of seeded noise

    def features(self, model: RewardModel, noisy: Tensor, timesteps: Tensor) -> Features:
        """Compute the features of noisy latents ``(B, C, ...)`` at ``timesteps`` ``(B,)``, at least float32."""
        features = model.backbone(noisy, timesteps, self.conditioning, self.uncond)
        return features.to(torch.promote_types(noisy.dtype, torch.float32))


class PromptMemory:
    """Least-recently-used cache of up to ``capacity`` prompts, encoded by the text encoder of ``model``.

    Prompts are encoded one at a time, so that rounding does not depend on the other prompts of a batch.
    """

    def __init__(self, model: RewardModel, capacity: int) -> None:
        self._model, self._capacity = model, capacity + model.head.needs_uncond  # the empty prompt comes beside them
        self._kept: OrderedDict[str | tuple[tuple[Any, ...], PixelLoader | None], Conditioning] = OrderedDict()

    def resize_sources(self, height: int, width: int) -> None:
        """Resize the pictures that prompts edit to the size of the images to score, as in training."""
        if (encoder := self._model.backbone.source_encoder) is not None:
            sizes = self._model.image_sizes
            loader = PixelLoader(height, width, "center_crop") if sizes is None else sizes.loader(height, width)
            encoder.loader = replace(loader, height=height, width=width, exif=self._model.exif)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the encoded prompts, one row per prompt."""
        rows = {prompt: self._encoded(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.join([rows[prompt] for prompt in prompts])

    def encode_uncond(self, prompts: Sequence[str] = ()) -> Conditioning | None:
        """Return the encoded empty prompt, see :func:`empty_prompts`; None if the head does not need it."""
        needed = self._model.head.needs_uncond
        return self.encode(empty_prompts(self._model.backbone.text_encoder, prompts)) if needed else None

    def __contains__(self, prompt: str) -> bool:
        """Tell whether the encoded prompt is kept."""
        return self._key(prompt) in self._kept

    def _key(self, prompt: str) -> str | tuple[Any, ...]:
        """Return a key of a prompt and the size of its pictures that does not hold their bytes."""
        sources = self._model.backbone.source_encoder
        if isinstance(prompt, EditPrompt) and sources is not None:
            return str(prompt), *map(sources.key, prompt.sources)
        return prompt

    def _encoded(self, prompt: str) -> Conditioning:
        key = self._key(prompt)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        encoded = self._kept[key] = self._model.backbone.encode_prompts([seen_as(prompt, exif=self._model.exif)])
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return encoded


def score_images(
    model: RewardModel,
    prompts: Sequence[str],
    images: Images,
    levels: Sequence[ScoringNoise],
    batch_size: int,
    memory: PromptMemory | None = None,
) -> Tensor:
    """Score N images under K noise settings: ``(N, K)`` or ``(N, K, out_dim)``, at least float32, on the CPU."""
    for noise in levels:  # raises for a level out of range before images are decoded
        timesteps_of(noise, model.backbone.noise_process)
    memory = memory or PromptMemory(model, max(batch_size, PROMPTS_KEPT))
    rows: list[int] = []
    scores: list[Tensor] = []
    numbers = [len(sources_of(prompt)) for prompt in prompts]
    for places, pixels in pixel_batches(images, model.image_sizes, batch_size, even_step(model), model.exif, numbers):
        check_multiples("images", pixels.shape[-2:], model.backbone.side_multiple)
        memory.resize_sources(*pixels.shape[-2:])
        of_batch = [prompts[row] for row in places]
        wanted = torch.is_grad_enabled() and pixels.requires_grad
        with torch.set_grad_enabled(wanted):
            encoded = EncodedBatch(
                model.encode_images(pixels.to(model.device), differentiable=wanted),
                of_batch,
                memory.encode(of_batch),
                memory.encode_uncond(of_batch),
            )
            scored = torch.stack([score_encoded(model, encoded, noise) for noise in levels], dim=1).cpu()
        check_finite(scored, of_batch, places)
        rows += places
        scores.append(scored)
    if not scores:
        return torch.zeros(0, len(levels), *outputs_of(model))
    return torch.cat(scores)[torch.tensor(rows).argsort()]


def score_given_latents(
    model: RewardModel,
    prompts: Sequence[str],
    latents: Tensor,
    noise: ScoringNoise,
    draws: Tensor | None,
    conditioning: tuple[Conditioning, Conditioning | None] | None,
    batch_size: int,
) -> Tensor:
    """Add noise to N clean latents and score them: ``(N,)`` or ``(N, out_dim)``, at least float32."""

    def score(batch: EncodedBatch, part: slice) -> Tensor:
        return score_encoded(model, replace(batch, draws=None if draws is None else draws[part]), noise)

    return score_parts(model, prompts, range(len(latents)), latents, conditioning, batch_size, score)


def score_parts(
    model: RewardModel,
    prompts: Sequence[str],
    rows: Sequence[int],
    latents: Tensor,
    given: tuple[Conditioning, Conditioning | None] | None,
    batch_size: int,
    score: Callable[[EncodedBatch, slice], Tensor],
) -> Tensor:
    """Score latents batch by batch with ``score``, which also gets the batch's slice of the latents.

    ``rows`` are the indices of the latents' prompts; ``given`` are encoded prompts, which are encoded here if None.
    """
    memory, scores = PromptMemory(model, max(batch_size, PROMPTS_KEPT)), []
    texts, uncond = given or (None, None)
    sides, downscale = latents.shape[-2:], model.backbone.latent_space.downscale
    check_multiples("latents", sides, model.backbone.side_multiple // downscale)
    memory.resize_sources(*(side * downscale for side in sides))
    with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
        for part in even_parts(len(latents), batch_size, even_step(model)):
            of_batch = [prompts[row] for row in rows[part]]
            encoded = memory.encode(of_batch) if texts is None else texts.select(rows[part]).to(model.device)
            empty = memory.encode_uncond(of_batch) if uncond is None else uncond.empty_for(rows[part]).to(model.device)
            moved = latents[part].to(model.device, torch.promote_types(latents.dtype, torch.float32))
            scored = score(EncodedBatch(moved, of_batch, encoded, empty), part)
            check_finite(scored, of_batch, rows[part])
            scores.append(scored)
    return torch.cat(scores) if scores else latents.new_zeros(0, *outputs_of(model))


def score_encoded(model: RewardModel, batch: EncodedBatch, noise: ScoringNoise) -> Tensor:
    """Score one encoded batch: ``(B,)`` or ``(B, out_dim)``, at least float32, averaged over the seeds."""
    process, latents, scores = model.backbone.noise_process, batch.latents, []
    timesteps = timesteps_of(noise, process)
    for seed in noise.seeds if batch.draws is None else (None,):
        levels = []
        for timestep, sigma in zip(timesteps.to(latents.device), process.sigma(timesteps).tolist(), strict=True):
            draw = batch.draws
            if draw is None:
                draw = draw_noise(batch.prompts, seed, sigma, latents.shape[1:])
            repeated = timestep.repeat(len(latents))
            noisy = process.add_noise(latents, draw.to(latents), repeated)
            levels.append(batch.features(model, noisy, repeated))
        scores.append(head_scores(model, levels, len(latents)))
    return torch.stack(scores).mean(dim=0)


def head_scores(model: RewardModel, levels: Sequence[Features], count: int) -> Tensor:
    """Score ``count`` rows from their features at each level, on a CPU one row at a time."""
    rows = even_parts(count, 1 if even_step(model) > 1 else count, 1)
    parts = [[rows_of(features, part) for features in levels] for part in rows]
    scores = torch.cat([model.head.score_ensemble(part) if len(part) > 1 else model.head(part[0]) for part in parts])
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def outputs_of(model: RewardModel) -> tuple[int, ...]:
    """Return the shape of an image's outputs: ``(2,)`` of a head with two axes, else empty."""
    return (len(model.axes),) if model.axes else ()


def even_step(model: RewardModel) -> int:
    """Return the number of rows of which a batch should hold a multiple on the model's device: see :func:`even_parts`.

    It is 1 on an accelerator. A head has arrays, such as one number per token, for which :data:`ROWS` rows are not
    enough; on a CPU heads therefore score one row at a time.
    """
    return ROWS if model.device.type == "cpu" else 1


def prompt_of_each(prompts: str | Sequence[str], count: int) -> Sequence[str]:
    """Return a prompt for each of ``count`` images, a single text repeated; raise InputError if there are others."""
    if isinstance(prompts, str):
        prompts = [prompts] * count
    if len(prompts) != count:
        raise InputError(f"prompts: {len(prompts)} for {count} images; give one for each, or a single text for all")
    for number, prompt in enumerate(prompts):
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError(f"prompt number {number} {prompt[:60]!a} holds half a character; decode its file as UTF-8")
    return list(prompts)


def check_finite(scores: Tensor, prompts: Sequence[str], rows: Sequence[int]) -> None:
    """Raise InputError if a score is NaN or infinite; names the first such image."""
    finite = scores.detach().isfinite().flatten(1).all(dim=1) if scores.ndim > 1 else scores.detach().isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise InputError(
            f"the score of image number {rows[first]} for the prompt {prompts[first][:60]!r} is not finite; look for "
            "NaN in the image or latents, try dtype float32, or get the model's weights again"
        )
