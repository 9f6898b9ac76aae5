"""Encoded images to pixels: one decode policy, two resize policies, one error per thing that can be wrong."""

import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from latentreward.contracts import ImageRef
from latentreward.errors import InputError

ResizePolicy = Literal["stretch", "center_crop"]
ExifOrientation = Literal["apply", "ignore"]
"""Whether an image is turned upright as its EXIF orientation says, or taken as its pixels are stored."""
UPRIGHT = 1
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the stored pixels upright; from 5 on, height and width change places."""
ORIENTATION_TAGS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Entries of ``Image.info`` that Pillow finds an orientation in."""
MAX_PIXELS = 64 * 1024 * 1024
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EIGHT_BITS = tuple((level + 128) // 257 for level in range(65536))
"""16-bit level → 8-bit level."""
RGB_BYTES = 4
"""Per pixel, in Pillow's memory."""
EXTRA_BYTES = {"WEBP": 12, "1": 1, "L": 1, "P": 1, "I": 5, "I;16": 3}
"""Format or mode → bytes per pixel beside the result while it is decoded, as measured; 8 of others at most."""
BROKEN_FILE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
"""What Pillow's decoders raise on damaged bytes."""
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

NO_IMAGE = "no image"
EMPTY = "empty image"
MISSING = "missing file"
OUTSIDE = "path outside the root"
UNKNOWN = "unknown image format"
DAMAGED = "truncated or damaged image"
TOO_LARGE = "too many pixels"
ALPHA, DEEP, CMYK = "alpha, which is dropped", "16 bits per channel, which become 8", "CMYK, which becomes RGB"
"""Names of what decoding changes."""
IMAGE_PROBLEMS = (NO_IMAGE, EMPTY, MISSING, OUTSIDE, UNKNOWN, DAMAGED, TOO_LARGE)


class ImageError(InputError):
    """An image that cannot be used.

    Args:
        message: One line. Of a traceback, which is what a ``DataLoader`` worker makes of a message, the last line.
        problem: One of ``IMAGE_PROBLEMS``.
    """

    def __init__(self, message: str, problem: str = DAMAGED) -> None:
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))
        self.problem = problem


@dataclass(frozen=True)
class PixelLoader:
    """Decode an image and bring it to the size that a network takes.

    Attributes:
        height: Pixels.
        width: Pixels.
        resize: ``"stretch"`` resizes both axes on their own, bilinear (what LRM was trained with); ``"center_crop"``
            keeps the aspect ratio, cuts what hangs over at both ends and resizes with a Lanczos filter.
        max_pixels: Images with more are refused from their header, before they are decoded.
        exif: Whether images are turned upright by their EXIF orientation.
    """

    height: int
    width: int
    resize: ResizePolicy = "stretch"
    max_pixels: int = MAX_PIXELS
    exif: ExifOrientation = "ignore"

    def __call__(self, image: ImageRef) -> Tensor:
        """Pixels ``(3, height, width)``, float32 in [-1, 1].

        Raises:
            ImageError: If the image cannot be read.
        """
        return self.pixels(decode_image(image, self.max_pixels, self.exif))

    def pixels(self, decoded: Image.Image) -> Tensor:
        """Pixels ``(3, height, width)``, float32 in [-1, 1], of an 8-bit RGB image."""
        if self.resize == "stretch":
            resized = decoded.resize((self.width, self.height), Image.Resampling.BILINEAR)
        else:
            resized = ImageOps.fit(decoded, (self.width, self.height), Image.Resampling.LANCZOS)
        levels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
        return (levels.float() / 255 - 0.5) / 0.5

    def blank(self) -> Tensor:
        """Mid-grey pixels ``(3, height, width)``, what stands in for an image under ``on_error: placeholder``."""
        return torch.zeros(3, self.height, self.width)


def decode_image(image: ImageRef, max_pixels: int = MAX_PIXELS, exif: ExifOrientation = "ignore") -> Image.Image:
    """Decode to 8-bit RGB.

    Alpha is dropped, not composited; the first frame of an animation is taken; 16-bit grey levels are divided by 257.
    These, with EXIF orientation ignored, are the rules under which the published reward models saw their data. The
    result has no EXIF orientation any more.

    Args:
        image: Its bytes, or a file.
        max_pixels: Limit on width × height, checked before decoding.
        exif: Whether the image is turned upright by its EXIF orientation.

    Raises:
        ImageError: If there are no bytes, no such file, or the bytes are no whole image of a known format.
        InputError: If it holds latents.
    """
    with _opened(image, max_pixels) as opened:
        return _to_rgb(opened, exif)


def convert_image(
    image: Image.Image, name: str, max_pixels: int = MAX_PIXELS, exif: ExifOrientation = "ignore"
) -> Image.Image:
    """To 8-bit RGB by the rules of :func:`decode_image`, from an image of any mode that Pillow has opened already.

    Args:
        image: The image.
        name: What messages call it.
        max_pixels: Limit on width × height.
        exif: Whether the image is turned upright by its EXIF orientation.

    Raises:
        ImageError: If it has no pixels or too many, or its file turns out to be damaged.
    """
    ref = ImageRef(name)
    if not image.width * image.height:
        raise image_error(ref, EMPTY, f"{image.width}×{image.height} pixels")
    _check_pixels(ref, image, max_pixels)
    try:
        return _to_rgb(image, exif)
    except BROKEN_FILE as error:
        raise image_error(ref, DAMAGED, str(error)) from error


class ImageHeader(NamedTuple):
    """What the header of an image file says.

    Attributes:
        height: Pixels, as the image is decoded.
        width: Pixels, likewise.
        rotated: Whether it has an EXIF orientation other than upright.
        oddities: What decoding changes beside the orientation.
    """

    height: int
    width: int
    rotated: bool
    oddities: tuple[str, ...]


def read_header(image: ImageRef, max_pixels: int = MAX_PIXELS, exif: ExifOrientation = "ignore") -> ImageHeader:
    """Read the header alone; whether the rest can be decoded remains to be seen.

    Args:
        image: Its bytes, or a file.
        max_pixels: Limit on width × height.
        exif: Whether decoding turns the image upright by its EXIF orientation.

    Raises:
        ImageError: As :func:`decode_image`, for what the header shows.
    """
    with _opened(image, max_pixels) as opened:
        width, height = opened.size
        orientation = exif_orientation(opened)
        if exif == "apply" and orientation >= 5:
            height, width = width, height
        deep = _is_16_bit(opened.mode) or any(";16" in str(tile) for tile in getattr(opened, "tile", ()))
        odd = {ALPHA: opened.has_transparency_data, DEEP: deep, CMYK: opened.mode == "CMYK"}
        return ImageHeader(height, width, orientation != UPRIGHT, tuple(name for name, is_so in odd.items() if is_so))


def image_size(image: ImageRef, max_pixels: int = MAX_PIXELS, exif: ExifOrientation = "ignore") -> tuple[int, int]:
    """(height, width) in pixels of the decoded image, from its header; see :func:`read_header`."""
    header = read_header(image, max_pixels, exif)
    return header.height, header.width


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of an opened image; 1, which is upright, if it has none that can be read."""
    try:
        # PNG's own getexif decodes all pixels in search of a tag behind them, where a header should do.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except (*BROKEN_FILE, LookupError, ArithmeticError):
        return UPRIGHT
    return found if found in TRANSPOSITIONS else UPRIGHT


def decoding_bytes(image: ImageRef, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Memory from the header alone: what the decoded image takes, and what decoding it takes beside.

    Raises:
        ImageError: As :func:`image_size`.
    """
    with _opened(image, max_pixels) as opened:
        pixels = opened.width * opened.height
        extra = EXTRA_BYTES.get(opened.format or "") or EXTRA_BYTES.get(opened.mode, 8)
        return RGB_BYTES * pixels, extra * pixels


@contextmanager
def _opened(image: ImageRef, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and its size checked; what Pillow raises inside becomes an ImageError."""
    source = _open_source(image)
    try:
        with Image.open(source, formats=FORMATS) as opened:
            _check_pixels(image, opened, max_pixels)
            yield opened
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise image_error(image, UNKNOWN, f"not one of {', '.join(FORMATS)}") from error
    except BOMB as error:
        raise image_error(image, TOO_LARGE, f"exceeds max_pixels={max_pixels}") from error
    except BROKEN_FILE as error:
        raise image_error(image, DAMAGED, str(error)) from error


def _check_pixels(image: ImageRef, opened: Image.Image, max_pixels: int) -> None:
    width, height = opened.size
    if width * height > max_pixels:
        raise image_error(image, TOO_LARGE, f"{width}×{height} exceeds max_pixels={max_pixels}")


def resolve_inside(root: Path, path: Path) -> Path | None:
    """The real path of ``path``, or None if it leads out of ``root``; symbolic links are followed."""
    try:
        resolved = path.resolve()
        return resolved if resolved.is_relative_to(root.resolve()) else None
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long or holds a null byte
        return None


def _open_source(image: ImageRef) -> BytesIO | Path:
    if image.holds == "latents":
        raise InputError(f"image {image.image_key!r} holds latents, no image; import them with `latentreward cache`")
    if image.data is not None:
        if not image.data:
            raise image_error(image, EMPTY, "0 bytes")
        return BytesIO(image.data)
    path = image.path
    if path is None:
        raise image_error(image, NO_IMAGE, "the row has none")
    if image.root is not None:
        path = resolve_inside(image.root, path)
        if path is None:
            raise image_error(image, OUTSIDE, f"leads out of {image.root}")
    try:
        status = path.stat()
    except OSError as error:
        raise image_error(image, MISSING, f"{path}: {error.strerror}") from error
    except ValueError as error:  # a null byte
        raise image_error(image, MISSING, f"{str(path)!r}: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise image_error(image, MISSING, f"{path} is not a file")
    if status.st_size == 0:
        raise image_error(image, EMPTY, f"{path} has 0 bytes")
    return path


def _to_rgb(image: Image.Image, exif: ExifOrientation) -> Image.Image:
    if exif == "apply" and (orientation := exif_orientation(image)) != UPRIGHT:
        image = image.transpose(TRANSPOSITIONS[orientation])
    if _is_16_bit(image.mode):  # Pillow's own conversion clips 16 bits to white
        image = image.convert("I").point(EIGHT_BITS, "L")
    decoded = image.convert("RGB")
    for tag in ORIENTATION_TAGS:  # else who gets the image would turn it a second time, or against the setting
        decoded.info.pop(tag, None)
    return decoded


def _is_16_bit(mode: str) -> bool:
    return mode == "I" or mode.startswith("I;16")


def image_error(image: ImageRef, problem: str, detail: str) -> ImageError:
    """One line about an image, or latents, that cannot be used; ``problem`` is one of ``IMAGE_PROBLEMS``."""
    what = "latents" if image.holds == "latents" else "image"
    return ImageError(f"{what} {image.image_key!r}: {problem} ({' '.join(detail.split())})", problem)
