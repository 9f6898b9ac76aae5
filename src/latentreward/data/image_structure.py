"""Walks over the segments of JPEG files and the chunks of PNG files, for limits that their bytes alone do not tell."""

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY

SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""Marker of the end of a JPEG image, or of a segment that begins with its length."""
END, SCAN = 0xD9, 0xDA
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
HEAD, CRC = 8, 4
"""Bytes before and after what a PNG chunk holds."""


def count_scans(jpeg: bytes) -> int:
    """Count the scans of the first image of a JPEG file.

    What other segments hold does not count, nor what follows the image, such as the video of a motion photo.
    """
    scans = place = 0
    while (found := SEGMENT.search(jpeg, place)) is not None and jpeg[found.end() - 1] != END:
        scans += jpeg[found.end() - 1] == SCAN
        place = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return scans


def drop_long_texts(source: BytesIO | Path) -> BytesIO | Path:
    """Return a PNG without the texts and colour profiles that Pillow refuses for their length; others as they are.

    The pixels do not depend on them. ComfyUI, for one, writes its whole workflow into a picture.
    """
    with BytesIO(source.getvalue()) if isinstance(source, BytesIO) else source.open("rb") as file:
        if file.read(len(PNG)) != PNG:
            return source
        long, held = [], 0  # start and end of each chunk to leave out; bytes of the texts that stay
        while len(head := file.read(HEAD)) == HEAD:
            length, kind = struct.unpack(">I4s", head)
            start = file.tell() - HEAD
            end = start + HEAD + length + CRC
            if kind in TEXTS:
                size = _text_size(kind, file.read(length))
                if held + size > MAX_TEXT_MEMORY:
                    long.append((start, end))
                else:
                    held += size
            file.seek(end)
        if not long:
            return source
        file.seek(0)
        data = file.read()
    starts, ends = zip(*long, strict=True)
    return BytesIO(b"".join(data[a:b] for a, b in zip((0, *ends), (*starts, len(data)), strict=True)))


def _text_size(kind: bytes, chunk: bytes) -> int:
    """Return the bytes of a text as Pillow holds it; more than it allows in all for one that it refuses."""
    rest = chunk.partition(b"\0")[2]
    if kind == b"iTXt":  # flag of compression, its method, language and translated keyword before the text
        packed, rest = rest[:1] not in (b"", b"\0"), rest[2:].split(b"\0", 2)[-1]
    else:
        packed, rest = kind != b"tEXt", rest[1:]
    if not packed:
        return len(rest)
    unpacker = zlib.decompressobj()
    try:
        size = len(unpacker.decompress(rest, MAX_TEXT_CHUNK))
    except zlib.error:  # Pillow takes such a text as empty
        return 0
    return MAX_TEXT_MEMORY + 1 if unpacker.unconsumed_tail else size
