"""From images, as users have them, to batches of pixels of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentreward.contracts import ImageRef
from latentreward.data.ahead import map_ahead
from latentreward.data.images import ExifOrientation, convert_image, decode_image
from latentreward.errors import InputError
from latentreward.scoring.image_sizes import ImageSizes
from latentreward.storage.digests import digest

ImageInput = Image.Image | str | Path | bytes | ImageRef | np.ndarray
"""An image in memory, a file, encoded bytes, a reader's reference, or a uint8 array ``(H, W, 3)``."""
Images = Sequence[ImageInput] | Tensor
FORMS = "a PIL image, a path, encoded bytes, an ImageRef or a uint8 array (H, W, 3)"
LARGEST_PIXEL = 4.0
"""Beyond this, pixels cannot have been meant to lie in [-1, 1]: decoders overshoot by some tenths."""


class PixelBatch(NamedTuple):
    """Images of one size.

    Attributes:
        rows: Their places among the images given.
        pixels: ``(B, 3, H, W)`` in [-1, 1].
        unfitting: Those of ``rows`` whose aspect ratio the model was not trained on.
    """

    rows: list[int]
    pixels: Tensor
    unfitting: list[int]


def even_parts(count: int, size: int, step: int) -> Iterator[slice]:
    """Rows 0 to ``count`` in slices of at most ``size`` rows: multiples of ``step`` as long as they last, then singles.

    On a CPU, vectorised kernels compute the last few numbers of an array by other instructions than those before, so
    that in a batch of 3 the last bits of a score depend on the row; in one of 4, 8, ... arrays have no such rest.
    """
    start = 0
    while start < count:
        rows = min(size, count - start)
        stop = start + (rows - rows % step or 1)
        yield slice(start, stop)
        start = stop


def as_images(images: ImageInput | Images, value_range: tuple[float, float] | None = None) -> Images:
    """Bring images to a list, a single one to a list of one; a tensor to ``(N, 3, H, W)`` about [-1, 1].

    Args:
        images: As :meth:`~latentreward.scoring.RewardModel.score` takes them.
        value_range: Lowest and highest value of a tensor's pixels; None for [-1, 1].

    Raises:
        InputError: If they are neither images nor a tensor of pixels.
    """
    if isinstance(images, Tensor):
        return as_pixels(images, value_range)
    if isinstance(images, Image.Image | str | Path | bytes | ImageRef):
        return [images]
    if isinstance(images, np.ndarray):
        if images.ndim not in (3, 4):
            raise InputError(
                f"images are an array of shape {images.shape}; give uint8 (N, H, W, 3), or a list of images"
            )
        return [images] if images.ndim == 3 else list(images)
    if not isinstance(images, Sized):
        raise InputError(f"images is a {type(images).__name__}; give a list of images, each {FORMS}")
    return images


def as_pixels(images: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Pixels ``(N, 3, H, W)`` about [-1, 1] of a tensor with values in ``value_range``, of N images or a single one.

    Raises:
        InputError: If it is not such a tensor.
    """
    pixels = images[None] if images.ndim == 3 else images
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
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


def doubts_of_pixels(pixels: Tensor, sizes: ImageSizes | None) -> dict[str, str]:
    """What looks wrong with a tensor ``(N, 3, H, W)`` that should lie in [-1, 1], by kind.

    Args:
        pixels: The tensor.
        sizes: The model's rule for sizes.
    """
    doubts = {}
    if pixels.numel() and pixels.detach().min() >= 0 and pixels.detach().max() <= 1:
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
) -> Iterator[PixelBatch]:
    """Batches of one size each, in the order in which they fill up; no more than one per size is held.

    Args:
        images: Images, each brought to its size; or pixels ``(N, 3, H, W)``, which are taken as they are.
        sizes: The model's rule.
        batch_size: Images per batch.
        step: See :func:`even_parts`.
        exif: Whether images are turned upright by their EXIF orientation.

    Raises:
        InputError: If an image cannot be read, or ``images`` are no images.
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

    waiting: dict[torch.Size, list[tuple[int, Tensor, bool]]] = {}
    for row, (pixels, fits) in enumerate(map_ahead(load, enumerate(images), batch_size)):
        batch = waiting.setdefault(pixels.shape, [])
        batch.append((row, pixels, fits))
        if len(batch) == batch_size:
            yield from _joined(waiting.pop(pixels.shape), step)
    for batch in waiting.values():
        yield from _joined(batch, step)


def _joined(batch: list[tuple[int, Tensor, bool]], step: int) -> Iterator[PixelBatch]:
    for part in even_parts(len(batch), len(batch), step):
        rows, pixels, fits = zip(*batch[part], strict=True)
        yield PixelBatch([*rows], torch.stack(pixels), [row for row, good in zip(rows, fits, strict=True) if not good])


def decode_any(image: Any, row: int, exif: ExifOrientation) -> Image.Image:
    """One image, in any of its forms, as 8-bit RGB.

    Raises:
        ImageError: If it cannot be read.
        InputError: If it is nothing that holds an image.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(
                f"image number {row} is a {image.dtype} array of shape {image.shape}; give uint8 (H, W, 3), or a "
                "tensor (N, 3, H, W) with its value_range"
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return convert_image(image, f"number {row}", exif=exif)
    if isinstance(image, ImageRef):
        return decode_image(image, exif=exif)
    if isinstance(image, bytes):
        return decode_image(ImageRef(f"number {row}", data=image), exif=exif)
    if isinstance(image, str | Path):
        return decode_image(ImageRef(str(image), path=Path(image)), exif=exif)
    raise InputError(f"image number {row} is a {type(image).__name__}; give {FORMS}")


def check_sides(pixels: Tensor, multiple: int) -> None:
    """Raise InputError for sides that VAE and patches do not divide."""
    height, width = pixels.shape[-2:]
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise InputError(
            f"images are {height}×{width} pixels, but this model takes sides that are multiples of {multiple}; resize "
            "them, or set image_sizes accordingly"
        )


def content_key(values: Tensor) -> str:
    """Name of what a tensor holds: equal values of equal shape and type have the same."""
    name = f"{values.dtype} {tuple(values.shape)} ".encode()
    content = values.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return digest([name, content])
