"""Conversion of users' images (PIL, paths, bytes, arrays, tensors) into batches of pixels of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import EditPrompt, ImageRef, LatentSpace
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.data import decode_image
from latentreward.data.ahead import map_ahead
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation, convert_image, png

ImageInput = Image.Image | str | Path | bytes | ImageRef | np.ndarray
"""Type of one image: a PIL image, a path, encoded bytes, a reader's reference, or a uint8 array ``(H, W, 3)``."""
Images = Sequence[ImageInput] | Tensor
FORMS = "a PIL image, a path, encoded bytes, an ImageRef or a uint8 array (H, W, 3)"
LARGEST_PIXEL = 4.0
"""Largest magnitude of pixels accepted as lying in [-1, 1]; VAE decoders overshoot that range by some tenths."""


class PixelBatch(NamedTuple):
    """Batch of B images of one size."""

    rows: list[int]  # index of each image among all images to score
    pixels: Tensor  # ``(B, 3, H, W)``, or of clips ``(B, 3, F, H, W)``, in [-1, 1]
    unfitting: list[int]  # subset of ``rows``: images with an aspect ratio that the model was not trained on


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

    Raises:
        InputError: If ``images`` is neither images nor a tensor of pixels.
    """
    if isinstance(images, Tensor):
        return as_pixels(images, value_range)
    if isinstance(images, Image.Image | str | Path | bytes | ImageRef):
        return [images]
    if isinstance(images, np.ndarray):
        if images.ndim not in (3, 4):
            raise InputError(f"images are an array of shape {images.shape}; give uint8 (N, H, W, 3), or a list")
        return [images] if images.ndim == 3 else list(images)
    if not isinstance(images, Sized):
        raise InputError(f"images is a {type(images).__name__}; give a list of images, each {FORMS}")
    return images


def as_pixels(images: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Convert pixels in ``value_range`` to ``(N, 3, H, W)``, or of clips to ``(N, 3, F, H, W)``, in [-1, 1].

    ``images`` are ``(N, 3, H, W)``, ``(3, H, W)`` or ``(N, 3, F, H, W)``, floating point.

    Raises:
        InputError: If shape or type differ, ``value_range`` is not ascending, or a converted pixel has a magnitude
            above :data:`LARGEST_PIXEL`.
    """
    pixels = images[None] if images.ndim == 3 else images
    if pixels.ndim not in (4, 5) or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise InputError(
            f"images are a {images.dtype} tensor of shape {tuple(images.shape)}; give floating point (N, 3, H, W) in "
            "[-1, 1], or in the value_range that you name, uint8 arrays (N, H, W, 3), or latents to score_latents"
        )
    if value_range is not None and value_range != (-1, 1):
        low, high = value_range
        if not low < high:
            raise InputError(f"value_range is {value_range}; give the lowest and the highest value, e.g. (0, 1)")
        pixels = (pixels - low) * (2 / (high - low)) - 1
    largest = pixels.detach().abs().max().item() if pixels.numel() else 0.0
    if largest > LARGEST_PIXEL:
        within = "in [-1, 1]" if value_range is None else f"within value_range={value_range}"
        raise InputError(
            f"images hold a pixel of magnitude {images.detach().abs().max().item():g}, not {within}; scale them to "
            "[-1, 1], or name the range that they have as value_range"
        )
    return pixels


def check_frames(images: Images, sizes: ImageSizes | None, space: LatentSpace) -> None:
    """Check that a model trained on images gets images, and one trained on clips gets clips of as many frames.

    Raises:
        InputError: If it does not, or if pixels have a time axis and the model's latents have none.
    """
    if isinstance(images, Tensor) and images.ndim == 5 and space.frame_downscale is None:
        shape = f"{tuple(images.shape)}, but this model's latents have no time axis"
        raise InputError(f"images are a tensor of shape {shape}; give (N, 3, H, W)")
    given = images.shape[2] if isinstance(images, Tensor) and images.ndim == 5 else 1
    if sizes is not None and len(images) and given != sizes.frames:
        made, trained = (f"clips of {n} frames" if n > 1 else "images" for n in (given, sizes.frames))
        form = f"a tensor (N, 3, {sizes.frames}, H, W)" if sizes.frames > 1 else "images"
        raise InputError(f"{made} are given, but the model was trained on {trained}; give {form}, or another model")


def check_floating(name: str, tensor: Tensor, axes: int, form: str) -> None:
    """Raise InputError if an argument is no tensor of floating point numbers with at least so many axes."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} is of type {type(tensor).__name__}; give a tensor {form}")
    if tensor.ndim < axes or not tensor.is_floating_point():
        shape = tuple(tensor.shape)
        raise InputError(f"{name} are a {tensor.dtype} tensor of shape {shape}; give floating point {form}")


def doubts_of_pixels(pixels: Tensor, sizes: ImageSizes | None, range_given: bool) -> dict[str, str]:
    """Return warnings about a tensor of pixels ``(N, 3, H, W)`` or ``(N, 3, F, H, W)`` that should lie in [-1, 1].

    The key ``range`` stands for values that all lie in [0, 1], unless the user named their range; ``size`` for a size
    that the model was not trained at.
    """
    doubts = {}
    if not range_given and pixels.numel() and pixels.detach().min() >= 0 and pixels.detach().max() <= 1:
        doubts["range"] = (
            "all values of the image tensor lie in [0, 1], but [-1, 1] is expected; give value_range=(0, 1), or "
            "value_range=(-1, 1) if they are right"
        )
    height, width = pixels.shape[-2:]
    loader = None if sizes is None or not pixels.numel() else sizes.loader(height, width)
    if loader is not None and (loader.height, loader.width) != (height, width):
        doubts["size"] = (
            f"the image tensor is {height}×{width} pixels and scored at that size, but the model was trained at "
            f"{loader.height}×{loader.width}; resize it, or give PIL images, which are resized"
        )
    return doubts


def pixel_batches(
    images: Images,
    sizes: ImageSizes | None,
    batch_size: int,
    step: int = 1,
    exif: ExifOrientation = "apply",
    groups: Sequence[Any] | None = None,
) -> Iterator[PixelBatch]:
    """Yield batches of images of one size, each as soon as it is full; incomplete batches come last.

    Images are decoded, turned upright if ``exif`` says so, and resized; pixels are only cut into batches. For ``step``
    see :func:`even_parts`. A batch holds images of one group only, if ``groups`` names that of each image.

    Raises:
        InputError: If an image cannot be read, an item is not an image, or ``sizes`` is None and images need resizing.
    """
    if isinstance(images, Tensor):
        for part in even_parts(len(images), batch_size, step):
            yield PixelBatch([*range(part.start, part.stop)], images[part], [])
        return
    if sizes is None:
        raise InputError("this model does not tell its image size; set its image_sizes, e.g. OneSize(512, 512)")

    def load(item: tuple[int, Any]) -> tuple[Tensor, bool]:
        decoded = decode_any(item[1], item[0], exif)
        size = decoded.height, decoded.width
        return sizes.loader(*size).pixels(decoded), sizes.fits(*size)

    waiting: dict[tuple[torch.Size, Any], list[tuple[int, Tensor, bool]]] = {}
    for row, (pixels, fits) in enumerate(map_ahead(load, enumerate(images), batch_size)):
        kind = pixels.shape, groups and groups[row]
        batch = waiting.setdefault(kind, [])
        batch.append((row, pixels, fits))
        if len(batch) == batch_size:
            yield from _joined(waiting.pop(kind), step)
    for batch in waiting.values():
        yield from _joined(batch, step)


def _joined(batch: list[tuple[int, Tensor, bool]], step: int) -> Iterator[PixelBatch]:
    for part in even_parts(len(batch), len(batch), step):
        rows, pixels, fits = zip(*batch[part], strict=True)
        yield PixelBatch([*rows], torch.stack(pixels), [row for row, good in zip(rows, fits, strict=True) if not good])


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
    """Decode one image of any type in :data:`ImageInput` to 8-bit RGB.

    Raises:
        ImageError: If the image cannot be decoded.
        InputError: If ``image`` is of another type, an array of the wrong shape or dtype, or one of floats up to 1.
    """
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
    if isinstance(image, ImageRef):
        return decode_image(image, exif=exif)
    if isinstance(image, bytes):
        return decode_image(ImageRef(f"number {row}", data=image), exif=exif)
    if isinstance(image, str | Path):
        return decode_image(ImageRef(str(image), path=Path(image)), exif=exif)
    raise InputError(f"image number {row} is a {type(image).__name__}; give {FORMS}")


def content_key(values: Tensor) -> str:
    """Return a hash of a tensor's values, shape and dtype."""
    name = f"{values.dtype} {tuple(values.shape)} ".encode()
    content = values.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return digest([name, content])
