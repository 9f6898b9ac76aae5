"""From images, as users have them, to batches of pixels of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from latentreward.contracts import ImageRef
from latentreward.data.ahead import map_ahead
from latentreward.data.images import convert_image, decode_image
from latentreward.errors import InputError
from latentreward.scoring.image_sizes import ImageSizes
from latentreward.storage.digests import digest

ImageInput = Image.Image | str | Path | bytes | ImageRef
"""An image in memory, a file, encoded bytes, or a reader's reference."""
Images = Sequence[ImageInput] | Tensor
LARGEST_PIXEL = 4.0
"""Beyond this, pixels cannot have been meant to lie in [-1, 1]: decoders overshoot by some tenths."""


class PixelBatch(NamedTuple):
    """Images of one size.

    Attributes:
        rows: Their places among the images given.
        pixels: ``(B, 3, H, W)`` in [-1, 1].
    """

    rows: list[int]
    pixels: Tensor


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


def pixel_batches(images: Images, sizes: ImageSizes | None, batch_size: int, step: int = 1) -> Iterator[PixelBatch]:
    """Batches of one size each, in the order in which they fill up; no more than one per size is held.

    Args:
        images: Images, each brought to its size; or pixels ``(N, 3, H, W)``, which are taken as they are.
        sizes: The model's rule.
        batch_size: Images per batch.
        step: See :func:`even_parts`.

    Raises:
        InputError: If an image cannot be read, or ``images`` are no images.
    """
    if isinstance(images, Tensor):
        check_pixels(images)
        for part in even_parts(len(images), batch_size, step):
            yield PixelBatch([*range(part.start, part.stop)], images[part])
        return
    if sizes is None:
        raise InputError("this model does not tell its image size; set its image_sizes, e.g. OneSize(512, 512)")
    waiting: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    loaded = map_ahead(lambda item: load_pixels(item[1], item[0], sizes), enumerate(images), batch_size)
    for row, pixels in enumerate(loaded):
        batch = waiting.setdefault(pixels.shape, [])
        batch.append((row, pixels))
        if len(batch) == batch_size:
            yield from _joined(waiting.pop(pixels.shape), step)
    for batch in waiting.values():
        yield from _joined(batch, step)


def _joined(batch: list[tuple[int, Tensor]], step: int) -> Iterator[PixelBatch]:
    for part in even_parts(len(batch), len(batch), step):
        yield PixelBatch([row for row, _ in batch[part]], torch.stack([pixels for _, pixels in batch[part]]))


def load_pixels(image: ImageInput, row: int, sizes: ImageSizes) -> Tensor:
    """Pixels ``(3, H, W)`` of one image at the model's size.

    Raises:
        ImageError: If it cannot be read.
        InputError: If it is nothing that holds an image.
    """
    if isinstance(image, Image.Image):
        decoded = convert_image(image, f"number {row}")
    elif isinstance(image, ImageRef):
        decoded = decode_image(image)
    elif isinstance(image, bytes):
        decoded = decode_image(ImageRef(f"number {row}", data=image))
    elif isinstance(image, str | Path):
        decoded = decode_image(ImageRef(str(image), path=Path(image)))
    else:
        raise InputError(
            f"image number {row} is a {type(image).__name__}; give a PIL image, a path, encoded bytes or an ImageRef"
        )
    return sizes.loader(decoded.height, decoded.width).pixels(decoded)


def check_pixels(pixels: Tensor) -> None:
    """Raise InputError for a tensor that is no ``(N, 3, H, W)`` of floating point numbers about [-1, 1]."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise InputError(
            f"images are a {pixels.dtype} tensor of shape {tuple(pixels.shape)}; give (N, 3, H, W) in [-1, 1], or "
            "latents to score_latents"
        )
    largest = pixels.detach().abs().max().item() if pixels.numel() else 0.0
    if largest > LARGEST_PIXEL:
        raise InputError(f"images hold a pixel of magnitude {largest:g}; scale them to [-1, 1]")


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
