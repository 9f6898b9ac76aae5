"""Decoding of images and of stored latents; each problem that an image can have has its kind of :class:`ImageError`."""

import os
import re
import stat
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError, quoted
from latentreward.core.storage.user_files import IS_POINTER, POINTER, PULL, find_file, relative_path, resolve_inside

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")
"""Suffixes of image files that can be decoded."""
SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""Marker of the end of a JPEG image, or of a segment that begins with its length."""
END, SCAN = 0xD9, 0xDA
# Pillow takes a text or a colour profile over 1 MiB in a PNG for damage. ComfyUI writes its whole workflow into one.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def count_scans(jpeg: bytes) -> int:
    """Count the scans of the first image of a JPEG file, not those in its segments or behind it (motion photos)."""
    scans = place = 0
    while (found := SEGMENT.search(jpeg, place)) is not None and jpeg[found.end() - 1] != END:
        scans += jpeg[found.end() - 1] == SCAN
        place = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return scans


ResizePolicy = Literal["stretch", "center_crop"]
ExifOrientation = Literal["apply", "ignore"]
"""``"apply"`` turns an image upright by its EXIF orientation; ``"ignore"`` takes the pixels as they are stored."""
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
"""EXIF orientation → transposition that turns the stored pixels upright; 5 to 8 exchange height and width."""
ORIENTATION_TAGS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Keys of ``Image.info`` in which Pillow looks for an orientation."""
MAX_PIXELS = 64 * 1024 * 1024
MAX_SCANS = 100
"""Greatest number of scans of a JPEG; cameras and programs write up to some 20, and each one costs a pass over it."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EIGHT_BITS = tuple((level + 128) // 257 for level in range(65536))
"""Table of 8-bit levels, indexed by 16-bit level."""
EXTRA_BYTES = {"WEBP": 12, "1": 1, "L": 1, "P": 1, "I": 5, "I;16": 3}
"""Format or mode → measured bytes per pixel that decoding needs beside the decoded image; at most 8 for others."""
BROKEN_FILE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
"""Exceptions that Pillow's decoders raise on damaged bytes."""
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""Names of the boxes with which mp4 and mov files begin, at their fifth byte."""
STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of files that begin as mp4 files do, but hold images: AVIF and HEIC."""
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

LATENT_DTYPES = ("float16", "float32")
"""Dtypes in which published caches store latents."""
NO_IMAGE = "no image"
EMPTY = "empty image"
MISSING = "missing file"
OUTSIDE = "path outside the root"
UNKNOWN = "unknown image format"
DAMAGED = "truncated or damaged image"
TOO_LARGE = "too many pixels"
SHORT = "clip too short"
CLIP = "clip, not an image"
COUNT = "wrong number of pictures to edit"
REFUSED = "edit that the text encoder does not take"
IMAGE_PROBLEMS = (NO_IMAGE, EMPTY, MISSING, OUTSIDE, UNKNOWN, DAMAGED, TOO_LARGE, SHORT, CLIP, COUNT, REFUSED)


class ImageError(InputError):
    """Error about an image that cannot be used.

    Args:
        message: One line. Of several lines the last is kept: a ``DataLoader`` worker raises the error again with its
            whole traceback as the message.
        problem: One of ``IMAGE_PROBLEMS``.
    """

    def __init__(self, message: str, problem: str = DAMAGED) -> None:
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))
        self.problem = problem


@dataclass(frozen=True)
class PixelLoader:
    """Decoder that also resizes an image to the size that a network takes.

    ``"stretch"`` resizes with a bilinear filter and ignores the aspect ratio (as LRM was trained). ``"center_crop"``
    crops the longer axis around the centre to the wanted aspect ratio and resizes with a Lanczos filter.
    """

    height: int  # of the result in pixels
    width: int
    resize: ResizePolicy = "stretch"
    max_pixels: int = MAX_PIXELS  # largest width × height of an image; larger ones raise ImageError before decoding
    exif: ExifOrientation = "ignore"

    def __call__(self, image: ImageRef) -> Tensor:
        """Decode and resize an image to pixels ``(3, height, width)``, float32 in [-1, 1]; may raise ImageError."""
        return self.pixels(decode_image(image, self.max_pixels, self.exif))

    def pixels(self, decoded: Image.Image) -> Tensor:
        """Resize an 8-bit RGB image to pixels ``(3, height, width)``, float32 in [-1, 1]."""
        if self.resize == "stretch":
            resized = decoded.resize((self.width, self.height), Image.Resampling.BILINEAR)
        else:
            resized = ImageOps.fit(decoded, (self.width, self.height), Image.Resampling.LANCZOS)
        return to_pixels(resized)

    def blank(self) -> Tensor:
        """Return mid-grey pixels ``(3, height, width)``, which replace an image under ``on_error: placeholder``."""
        return torch.zeros(3, self.height, self.width)


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an 8-bit RGB image to pixels ``(3, H, W)``, float32 in [-1, 1]."""
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (levels.float() / 255 - 0.5) / 0.5


def decode_image(image: ImageRef, max_pixels: int = MAX_PIXELS, exif: ExifOrientation = "ignore") -> Image.Image:
    """Decode an image to 8-bit RGB; ImageError if it cannot be read, or exceeds ``max_pixels``, width × height.

    Alpha is dropped, not composited. Of an animation the first frame is taken. 16-bit grey levels are divided by 257.
    The published reward models were trained on images decoded by these rules, with EXIF orientation ignored;
    ``exif="apply"`` turns the image upright by it. The result carries no EXIF orientation.
    """
    with _opened(image, max_pixels) as opened:
        _check_scans(image, opened)
        return _to_rgb(opened, exif)


def check_scans(image: ImageRef, max_pixels: int = MAX_PIXELS) -> None:
    """Read an image without decoding it, and raise ImageError for a JPEG of too many scans, as :func:`decode_image`."""
    with _opened(image, max_pixels) as opened:
        _check_scans(image, opened)


def convert_image(image: Image.Image, name: str, exif: ExifOrientation = "ignore") -> Image.Image:
    """Convert an image that Pillow has opened to 8-bit RGB by the rules of :func:`decode_image`."""
    ref = ImageRef(name)
    if not image.width * image.height:
        raise image_error(ref, EMPTY, f"{image.width}×{image.height} pixels")
    check_pixels(ref, image.size, MAX_PIXELS)
    try:
        return _to_rgb(image, exif)
    except BROKEN_FILE as error:
        raise image_error(ref, DAMAGED, str(error)) from error


class ImageHeader(NamedTuple):
    """Size and properties of an image, read from its header."""

    height: int  # height in pixels after decoding, thus after an EXIF orientation that is applied
    width: int  # width in pixels after decoding
    rotated: bool  # whether the image has an EXIF orientation other than upright
    plain: bool  # whether the file is a PNG or JPEG of 8-bit RGB that every reader decodes alike


def read_header(image: ImageRef, max_pixels: int = MAX_PIXELS, exif: ExifOrientation = "ignore") -> ImageHeader:
    """Read the header of an image without decoding it; the rest of the file may still be damaged.

    ``exif="apply"`` exchanges height and width if the EXIF orientation asks for it.
    """
    with _opened(image, max_pixels) as opened:
        width, height = opened.size
        orientation = exif_orientation(opened)
        if exif == "apply" and orientation >= 5:
            height, width = width, height
        deep = _is_16_bit(opened.mode) or any(";16" in str(tile) for tile in getattr(opened, "tile", ()))
        changed = opened.mode != "RGB" or opened.has_transparency_data or deep or orientation != UPRIGHT
        plain = opened.format in ("PNG", "JPEG") and not changed
        return ImageHeader(height, width, orientation != UPRIGHT, plain)


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8; 1 (upright) if it has none or none that can be read."""
    try:
        # The getexif of Pillow's PNG class decodes all pixels to find a tag behind them; the base class's does not.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except (*BROKEN_FILE, LookupError, ArithmeticError):
        return UPRIGHT
    return found if found in TRANSPOSITIONS else UPRIGHT


def decoding_bytes(image: ImageRef, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Estimate memory in bytes from an image's header: for the decoded image, and beside it while decoding."""
    with _opened(image, max_pixels) as opened:
        pixels, rows = opened.width * opened.height, 8 * max(opened.size)  # a pointer to each row, also when turned
        extra = EXTRA_BYTES.get(opened.format or "") or EXTRA_BYTES.get(opened.mode, 8)
        # Pillow takes four bytes for a pixel of RGB, and holds up to two more images of other modes meanwhile.
        return 4 * pixels + rows, extra * pixels + 2 * rows


@contextmanager
def _opened(image: ImageRef, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image, check its size, and turn Pillow's errors inside the ``with`` block into ImageError."""
    source = open_source(image)
    try:
        with Image.open(source, formats=FORMATS) as opened:
            check_pixels(image, opened.size, max_pixels)
            yield opened
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        with BytesIO(source.getvalue()) if isinstance(source, BytesIO) else source.open("rb") as file:
            start = file_start(image, file)
        if start[4:8] in MP4_BOXES and start[8:12] not in STILL_BRANDS:
            detail = "mp4 or mov; fit and cache read clips if frames is set, score if the model was trained on clips"
            raise image_error(image, CLIP, detail) from error
        raise image_error(image, UNKNOWN, f"not one of {', '.join(FORMATS)}; convert it to JPEG or PNG") from error
    except BOMB as error:
        raise image_error(image, TOO_LARGE, f"exceeds max_pixels={max_pixels}") from error
    except BROKEN_FILE as error:
        raise image_error(image, DAMAGED, str(error)) from error


def file_start(image: ImageRef, file: BinaryIO) -> bytes:
    """Return the first bytes of an opened file; raise ImageError for a git-lfs pointer."""
    if (start := file.read(len(POINTER))) == POINTER:
        raise image_error(image, UNKNOWN, f"{IS_POINTER}; {PULL}")
    return start


def check_pixels(image: ImageRef, size: tuple[int, int], max_pixels: int) -> None:
    """Raise ImageError for an image or frame of a size (width, height) beyond ``max_pixels``."""
    width, height = size
    if width * height > max_pixels:
        raise image_error(image, TOO_LARGE, f"{width}×{height} exceeds max_pixels={max_pixels}")


def _check_scans(image: ImageRef, opened: Image.Image) -> None:
    """Refuse a JPEG or BMP of a few kilobytes that would take seconds to minutes to decode."""
    if opened.format == "BMP" and any("rle" in str(tile) for tile in opened.tile):  # type: ignore[attr-defined]
        raise image_error(image, UNKNOWN, "a BMP of runs; save it as PNG")
    if opened.format not in ("JPEG", "MPO"):
        return
    file = opened.fp  # type: ignore[attr-defined]
    place = file.tell()
    file.seek(0)
    scans = count_scans(file.read())
    file.seek(place)
    if scans > MAX_SCANS:
        raise image_error(image, DAMAGED, f"a JPEG of {scans} scans; at most {MAX_SCANS} are decoded")


def file_image(folder: Path, path: str | bytes | None, prefix: str = "", allow_outside: bool = False) -> ImageRef:
    """Return a reference to a file of ``folder`` that a row names; its ``image_key`` begins with ``prefix``."""
    if not path:
        return ImageRef("")
    path = relative_path(os.fsdecode(path), folder)
    if "\\" in path and not os.path.lexists(folder / path):  # written on Windows
        path = path.replace("\\", "/")
    root = None if allow_outside else folder
    return ImageRef(prefix + str(PurePosixPath(path)), path=find_file(folder / path), root=root)


def outside(root: Path) -> str:
    """Return what is wrong with a file that lies outside the folder ``root``, and the remedy."""
    return f"leads out of {root}; move it there, or set allow_outside: true to read it"


def open_source(image: ImageRef) -> BytesIO | Path:
    """Return an image's bytes or the path of its file, which exists and is not empty; raise ImageError otherwise."""
    if image.holds == "latents":
        told = f"image {image.image_key!r} holds latents, not an image"
        raise InputError(f"{told}; import them with `latentreward cache`")
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
            raise image_error(image, OUTSIDE, outside(image.root))
    try:
        status = path.stat()
    except OSError as error:
        raise image_error(image, MISSING, f"{quoted(str(path))}: {error.strerror}") from error
    except ValueError as error:  # a null byte
        raise image_error(image, MISSING, f"{quoted(repr(str(path)))}: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise image_error(image, MISSING, f"{path} is not a file")
    if status.st_size == 0:
        raise image_error(image, EMPTY, f"{path} has 0 bytes")
    return path


def image_bytes(image: ImageRef) -> bytes:
    """Return the encoded bytes of an image; raise ImageError as :func:`open_source`."""
    source = open_source(image)
    return source.getvalue() if isinstance(source, BytesIO) else source.read_bytes()


def png(image: Image.Image) -> bytes:
    """Return the bytes of an image's PNG file."""
    content = BytesIO()
    image.save(content, "png")
    return content.getvalue()


def grey_picture() -> ImageRef:
    """Return a grey picture to edit, for trials, and in place of one that cannot be read."""
    return ImageRef("grey", data=png(Image.new("RGB", (64, 64), "gray")))


def _to_rgb(image: Image.Image, exif: ExifOrientation) -> Image.Image:
    if exif == "apply" and (orientation := exif_orientation(image)) != UPRIGHT:
        image = image.transpose(TRANSPOSITIONS[orientation])
    if _is_16_bit(image.mode):  # Pillow's own conversion clips 16 bits to white
        image = image.convert("I").point(EIGHT_BITS, "L")
    decoded = image.convert("RGB")
    for tag in ORIENTATION_TAGS:  # else code that gets the image could turn it again, or despite exif="ignore"
        decoded.info.pop(tag, None)
    return decoded


def _is_16_bit(mode: str) -> bool:
    return mode == "I" or mode.startswith("I;16")


def image_error(image: ImageRef, problem: str, detail: str) -> ImageError:
    """Return an ImageError with a one-line message; ``problem`` is one of ``IMAGE_PROBLEMS``."""
    what = "latents" if image.holds == "latents" else "image"
    return ImageError(f"{what} {quoted(repr(image.image_key))}: {problem} ({' '.join(detail.split())})", problem)


def decode_latents(image: ImageRef, clip: bool | None = False) -> np.ndarray:
    """Decode the latents of one image, float16 or float32, with the scale and shift that the cache's writer applied.

    They are ``(C, h, w)``, or ``(C, T, h, w)`` of a ``clip``; None takes both. All values are finite, or ImageError.
    """
    if image.data is None:
        raise image_error(image, NO_IMAGE, "the row has none")
    if not image.data:
        raise image_error(image, EMPTY, "0 bytes")
    try:
        array = np.load(BytesIO(image.data), allow_pickle=False)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, MemoryError) as error:  # numpy's on damaged bytes
        raise image_error(image, DAMAGED, f"not a whole np.save array: {error}") from error
    taken = (3, 4) if clip is None else (3 + clip,)
    axes = " or ".join("(C, h, w)" if count == 3 else "(C, T, h, w)" for count in taken)
    if not isinstance(array, np.ndarray) or array.ndim not in taken or str(array.dtype) not in LATENT_DTYPES:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise image_error(image, DAMAGED, f"{found} is not a {axes} array of {' or '.join(LATENT_DTYPES)}")
    if not np.isfinite(array).all():
        raise image_error(image, DAMAGED, "values that are not finite")
    return array


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, threads: int = 1
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` of each item in order, computed in threads ahead of its use."""
    pool, pending = ThreadPoolExecutor(threads), deque[Future[Result]]()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
