"""Decoding of clips by the times of their frames: mp4 files by PyAV (extra ``video``), animated WebP by Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError, check_at_least_one, check_range, errors_at
from latentreward.data.images import (
    BOMB,
    BROKEN_FILE,
    DAMAGED,
    MAX_PIXELS,
    SHORT,
    TOO_LARGE,
    UNKNOWN,
    PixelLoader,
    check_pixels,
    file_start,
    image_error,
    open_source,
)

FPS = 16.0
"""Frames per second of Wan 2.1's clips."""
MAX_DECODED = 20_000
"""Largest number of frames that are decoded of one clip, for files whose frames follow each other by microseconds."""
MAX_DECODED_PIXELS = 2**33
"""Largest number of pixels that are decoded of one clip; five seconds of 4K at 120 frames per second are 5·10⁹."""


class Clip(NamedTuple):
    """Frames of a clip."""

    pixels: Tensor  # ``(3, F, H, W)``, float32 in [-1, 1]
    size: tuple[int, int]  # height and width of the first frame before resizing
    unused: int  # number of frames, at the wanted number per second, that follow the frames taken


class Frame(NamedTuple):
    """Decoded frame; times are in ticks of the file's clock."""

    start: int  # from which the frame is shown
    end: int  # until which it is shown, as far as known before the next one
    size: tuple[int, int]  # height and width
    picture: Callable[[], Image.Image]  # returns the frame as 8-bit RGB


class Source(NamedTuple):
    """An opened file; length, total and size are as the file says."""

    frames: Iterator[Frame]  # in the order in which they are shown
    tick: Fraction  # seconds
    length: int | None  # ticks; None if the file does not say
    total: int  # frames; 0 if the file does not say
    size: tuple[int, int]  # height and width


@dataclass(frozen=True)
class ClipLoader(PixelLoader):
    """Decoder of clips that resizes each frame as :class:`PixelLoader` does images.

    Frame k is the one that is shown at k / ``fps`` seconds after the first frame, whatever the file's own frame rate,
    which need not be constant. A file must be shown for as long as the frames take; what follows them is not used.
    Files are mp4, mov, or animated WebP as ``latentreward generate`` writes it. Rotation in a file's header and audio
    are ignored.
    """

    frames: int = 1  # number of frames F
    fps: float = FPS  # frames per second

    def __post_init__(self) -> None:
        check_clips("", self.frames, self.fps)

    def __call__(self, image: ImageRef) -> Tensor:
        """Decode a clip to pixels ``(3, F, height, width)``, float32 in [-1, 1]; may raise ImageError."""
        return self.load(image).pixels

    def load(self, image: ImageRef) -> Clip:
        """Decode a clip, and count the frames that are not used; see :meth:`__call__`."""
        with _opened(image, self.max_pixels) as source:
            check_pixels(image, source.size[::-1], self.max_pixels)
            taken: list[Tensor] = []
            size = 0, 0
            for frame in islice(self._shown(image, source), self.frames):
                size = size if taken else frame.size
                taken.append(self.pixels(frame.picture()))
            unused = 0
            if source.length is not None:
                shown = (source.length - Fraction(1, 2)) * source.tick * Fraction(self.fps)
                unused = max(0, math.ceil(shown) - self.frames)
            return Clip(torch.stack(taken, dim=1), size, unused)

    def blank(self) -> Tensor:
        return torch.zeros(3, self.frames, self.height, self.width)

    def _shown(self, image: ImageRef, source: Source) -> Iterator[Frame]:
        """Yield the frame that is shown at each time; half a tick of the file's clock is rounding.

        After the last frame of the file, ImageError is raised.
        """
        taken = decoded = pixels = first = 0
        before: Frame | None = None

        def due(until: int) -> bool:
            return (until - first - Fraction(1, 2)) * source.tick > taken / Fraction(self.fps)

        for frame in source.frames:
            decoded += 1
            if decoded > MAX_DECODED:
                raise image_error(image, TOO_LARGE, f"more than {MAX_DECODED} frames in {taken / self.fps:g} s")
            check_pixels(image, frame.size[::-1], self.max_pixels)
            pixels += math.prod(frame.size)
            if pixels > MAX_DECODED_PIXELS:
                raise image_error(image, TOO_LARGE, f"more than {MAX_DECODED_PIXELS} pixels; give smaller frames")
            if before is None:
                first = frame.start
            elif frame.start < before.start:
                raise image_error(image, DAMAGED, "the times of its frames go back")
            while before is not None and due(frame.start):
                yield before
                taken += 1
            before = frame
        while before is not None and due(before.end):
            yield before
            taken += 1
        if before is not None and before.end == first:
            raise image_error(image, SHORT, "its frames have no durations; give an mp4 file, or an animated WebP")
        wanted = f"{taken} of frames={self.frames} at fps={self.fps:g} can be read"
        if source.total > decoded:
            raise image_error(image, DAMAGED, f"the file ends after {decoded} of its {source.total} frames: {wanted}")
        raise image_error(image, SHORT, f"{wanted}; give longer clips, or set fewer frames")


def clip_size(image: ImageRef) -> tuple[int, int]:
    """Read height and width of a clip from its header; the rest of the file may still be damaged."""
    with _opened(image, MAX_PIXELS) as source:
        check_pixels(image, source.size[::-1], MAX_PIXELS)
        return source.size


def check_clips(place: str, frames: int, fps: float) -> None:
    """Check the settings of clips."""
    check_at_least_one(place, frames=frames)
    check_range("(0, 1000]", f"Wan 2.1 has {FPS:g}", **{f"{place}fps": fps})


def require_pyav(frames: int) -> None:
    """Raise InputError if ``frames`` says that there are clips, and PyAV is missing."""
    if frames > 1:
        _av()


def check_frames(place: str, network: Any, frames: int) -> None:
    """Check that a backbone or a policy takes clips of ``frames`` frames; ``place`` as in :func:`check_clips`."""
    with errors_at(place):
        if (family := getattr(network, "family", None)) is not None:
            family.latent_shape(frames=frames)
        network.latent_space.check_frames(frames)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError("clips need PyAV; install latentreward[video], or av") from error
    return av


@contextmanager
def _opened(image: ImageRef, max_pixels: int) -> Iterator[Source]:
    """Open a clip, and turn errors of the decoders inside the block into ImageError.

    Decoders read an open file, so that a name cannot be taken for an address.
    """
    source = open_source(image)
    with source if isinstance(source, BytesIO) else Path(source).open("rb") as file:
        start = file_start(image, file)
        file.seek(0)
        try:
            with _webp(file) if start[:4] + start[8:12] == b"RIFFWEBP" else _mp4(image, file, max_pixels) as opened:
                yield opened
        except InputError:  # such as a missing PyAV
            raise
        except (*BROKEN_FILE, *BOMB) as error:
            raise image_error(image, DAMAGED, _reason(error)) from error


@contextmanager
def _mp4(image: ImageRef, file: BinaryIO, max_pixels: int) -> Iterator[Source]:
    """Open an mp4 or mov file; PyAV takes that format as given, so that playlists in such files are not followed."""
    av = _av()
    broken = (av.FFmpegError, OSError, ValueError)
    try:
        # No protocol has the name none: files that a clip refers to are not opened.
        container = av.open(file, format="mov", options={"protocol_whitelist": "none", "enable_drefs": "0"})
    except broken as error:
        raise image_error(image, UNKNOWN, f"no whole mp4 or mov file: {_reason(error)}") from error
    with container:
        if not container.streams.video:
            raise image_error(image, DAMAGED, "no video track, or cut off before it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise image_error(image, DAMAGED, "its video track does not name a codec that is known")
        size = stream.codec_context.height, stream.codec_context.width
        stream.codec_context.options = {"max_pixels": str(max_pixels)}  # the frames may have another size
        try:
            yield Source(_mp4_frames(image, container, stream), stream.time_base, stream.duration, stream.frames, size)
        except av.FFmpegError as error:
            raise image_error(image, DAMAGED, _reason(error)) from error


def _mp4_frames(image: ImageRef, container: Any, stream: Any) -> Iterator[Frame]:
    ends: dict[int, int] = {}
    # PyAV 19 keeps one reformatter for all frames of a process. Its threads do not survive a fork, so that a loader's
    # worker would wait for them for ever after its parent has decoded a clip.
    reformatter = _av().video.reformatter.VideoReformatter()
    for packet in container.demux(stream):
        if packet.pts is not None and packet.duration:
            ends[packet.pts] = packet.pts + packet.duration
        for frame in packet.decode():
            if frame.pts is None:
                raise image_error(image, DAMAGED, "a frame has no time")

            def picture(frame: Any = frame) -> Image.Image:
                return Image.fromarray(reformatter.reformat(frame, format="rgb24").to_ndarray())

            yield Frame(frame.pts, ends.pop(frame.pts, frame.pts + 1), (frame.height, frame.width), picture)


@contextmanager
def _webp(file: BinaryIO) -> Iterator[Source]:
    """Open an animated WebP, whose clock ticks in milliseconds; its length is known only after the last frame."""
    with Image.open(file, formats=["WEBP"]) as animation:
        count, size = getattr(animation, "n_frames", 1), (animation.height, animation.width)

        def frames() -> Iterator[Frame]:
            start = 0
            for number in range(count):
                animation.seek(number)
                picture = animation.convert("RGB")
                end = start + int(animation.info.get("duration", 0))
                yield Frame(start, end, (picture.height, picture.width), picture.copy)
                start = end

        yield Source(frames(), Fraction(1, 1000), None, count, size)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
