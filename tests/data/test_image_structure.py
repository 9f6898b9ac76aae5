"""Limits on scans of JPEG files and texts of PNG files, by what the files hold and not by their bytes."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.data import ImageError, decode_image
from latentreward.data.images import count_scans
from latentreward.data.inspection import ImageCensus

NOISE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
SCANS = b"\xff\xda\x00\x08" * 300


def encode(fmt: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, fmt, **options)
    return stream.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


JPEG, PNG = encode("JPEG"), encode("PNG")
LONG = zlib.compress(bytes(2**20 + 1))


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:2] + segment(0xED, SCANS) + JPEG[2:],
        JPEG[:2] + segment(0xE1, SCANS) * 20 + segment(0xFE, SCANS) + JPEG[2:],
        JPEG + SCANS,  # the video of a motion photo
        JPEG + JPEG * 120,
        encode("JPEG", restart_marker_rows=1),
        encode("JPEG", progressive=True),
    ],
    ids=["segment", "segments", "video", "images", "restarts", "progressive"],
)
def test_scans_of_the_first_image_count(data: bytes) -> None:
    assert decode_image(ImageRef("a.jpg", data)).size == (40, 48)
    assert count_scans(data) == (10 if b"\xff\xc2" in data else 1)


@pytest.mark.parametrize("hidden", [b"", b"\xff\x01\x00\x08", b"\xff\x02\x00\x40", b"\xff\xff"])
def test_scans_behind_markers_without_a_length_count(hidden: bytes) -> None:
    last = JPEG[JPEG.rindex(b"\xff\xda") : -2]
    data = JPEG[:-2] + (hidden + last) * 150 + JPEG[-2:]
    assert count_scans(data) == 151
    with pytest.raises(ImageError, match="a JPEG of 151 scans; at most 100 are decoded"):
        decode_image(ImageRef("a.jpg", data))
    census = ImageCensus()
    census.add(PreferencePair("0", "", ImageRef("a", data), ImageRef("b", JPEG), 1.0))
    assert census.counts.unreadable_rows == {"truncated or damaged image": 1}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"iCCP", b"profile\0\0" + LONG),
        (b"zTXt", b"workflow\0\0" + LONG),
        (b"iTXt", b"workflow\0\1\0\0\0" + LONG),
        (b"tEXt", b"workflow\0" + b"x" * 2**21),
        (b"iTXt", b"workflow\0\0\0\0\0" + b"x" * 2**21),
        (b"zTXt", b"broken\0\0no zlib"),
    ],
)
@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "after them"])
def test_long_texts_of_a_png_are_no_damage(kind: bytes, content: bytes, place: int, tmp_path: Path) -> None:
    data = PNG[:place] + chunk(kind, content) + PNG[place:]
    (tmp_path / "a.png").write_bytes(data)
    for reference in (ImageRef("a", data), ImageRef("a", path=tmp_path / "a.png")):
        assert (np.asarray(decode_image(reference)) == NOISE).all()


@pytest.mark.slow
def test_many_texts_of_a_png_are_no_damage_and_its_orientation_stays() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode("PNG", exif=exif)
    texts = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20))) * 65 + chunk(b"iCCP", b"p\0\0" + LONG)
    image = decode_image(ImageRef("a", turned[:33] + texts + turned[33:]), exif="apply")
    assert image.size == (48, 40)


def test_a_png_of_too_many_pixels_is_refused_with_long_texts_too() -> None:
    large = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = PNG[:8] + chunk(b"IHDR", large) + chunk(b"iCCP", b"p\0\0" + LONG) + PNG[33:]
    with pytest.raises(ImageError, match="too many pixels"):
        decode_image(ImageRef("a", data))


@pytest.mark.parametrize("text", ["iVBORw0KGgo" + "A" * 400_000 + "==", "data:image/png;base64,iVBORw0KGgo"])
def test_base64_in_the_place_of_a_path_is_told_in_a_short_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=re.escape("no image (base64 text, not a path; write the image")) as caught:
        decode_image(ImageRef(text, path=tmp_path / text, root=tmp_path))
    assert len(str(caught.value)) < 350
