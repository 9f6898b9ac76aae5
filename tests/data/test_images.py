"""Images become RGB or one clear line: modes, orientation, damage, limits on pixels, scans and texts, paths."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import ImageError, PixelLoader, decode_image
from latentreward.data.images import ExifOrientation, convert_image, count_scans, read_header
from latentreward.data.inspection import ImageCensus
from tests.data.rotated import photograph, upright


def encode(array: np.ndarray, fmt: str = "PNG", mode: str | None = None, **options) -> ImageRef:
    image = Image.fromarray(array)
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, fmt, **options)
    return ImageRef("key", stream.getvalue())


NOISE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """A few bytes that claim to be a large PNG."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = decode_image(encode(NOISE, mode=mode))
    assert (image.mode, image.size) == ("RGB", (40, 48))


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = decode_image(encode(np.full((9, 9, 3), (250, 250, 250), np.uint8), "JPEG", "CMYK"))
    assert image.mode == "RGB"
    assert np.asarray(image).mean() > 240


def test_alpha_is_dropped_not_composited() -> None:
    pixels = np.full((4, 4, 4), (10, 200, 30, 0), np.uint8)
    assert (np.asarray(decode_image(encode(pixels))) == (10, 200, 30)).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_every_16_bit_level_is_rounded_and_others_are_clipped(mode: str) -> None:
    levels = np.arange(65536) if mode != "I" else np.array([-(2**31), -1, *range(65536), 65536, 2**31 - 1])
    dtype = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (len(levels), 1), levels.astype(dtype).tobytes())
    found = np.asarray(convert_image(image, "key"))[0]
    assert (found == ((levels.clip(0, 65535) + 128) // 257)[:, None]).all()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_or_ignored(orientation: int, fmt: str) -> None:
    data = photograph(orientation, fmt=fmt)
    reference = ImageRef("key", data)
    seen, stored = decode_image(reference, exif="apply"), decode_image(reference)
    assert np.array_equal(seen, upright(data))
    assert np.array_equal(stored, Image.open(io.BytesIO(data)))
    assert np.array_equal(seen, stored) == (orientation == 1)
    assert read_header(reference, exif="apply")[:2] == (seen.height, seen.width)
    assert read_header(reference)[:2] == (stored.height, stored.width) == (32, 48)
    assert read_header(reference).rotated == (orientation != 1)
    pixels = PixelLoader(16, 16, exif="apply")(reference)
    assert torch.equal(pixels, PixelLoader(16, 16).pixels(upright(data)))


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_an_image_is_turned_once(exif: ExifOrientation) -> None:
    """What was decoded as stored is not turned by those who get it, and what was turned is not turned again."""
    decoded = decode_image(ImageRef("key", photograph()), exif=exif)
    assert np.array_equal(convert_image(decoded, "key", exif="apply"), decoded)
    opened = Image.open(io.BytesIO(photograph()))
    for _ in range(2):
        assert np.array_equal(convert_image(opened, "key", exif=exif), decoded)
    assert opened.getexif()[ExifTags.Base.Orientation] == 6  # the user's own image stays as it was


def test_a_damaged_exif_block_costs_the_orientation_alone() -> None:
    data = photograph(fmt="PNG")
    start = data.index(b"eXIf") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big")
    random = np.random.default_rng(0)
    for _ in range(200):
        block = bytearray(data[start : start + length])
        for place in random.integers(0, length, 4):
            block[place] = random.integers(256)
        crc = zlib.crc32(b"eXIf" + block).to_bytes(4, "big")
        damaged = ImageRef("key", data[:start] + bytes(block) + crc + data[start + length + 4 :])
        decoded = decode_image(damaged, exif="apply")
        assert read_header(damaged, exif="apply")[:2] == (decoded.height, decoded.width)
        assert {*decoded.size} == {48, 32}


def png_of_16_bits() -> ImageRef:
    """A PNG of 16 bits per channel in colour, which Pillow itself cannot write."""
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + bytes(12)))
    return ImageRef("key", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("image", "plain"),
    [
        (encode(NOISE), True),
        (encode(NOISE, mode="L"), False),
        (encode(NOISE, mode="RGBA"), False),
        (encode(NOISE, "GIF", mode="P", transparency=0), False),
        (encode(NOISE[..., 0].astype(np.uint16)), False),
        (png_of_16_bits(), False),
        (encode(NOISE, "JPEG", "CMYK"), False),
    ],
)
def test_a_header_tells_whether_every_reader_decodes_alike(image: ImageRef, plain: bool) -> None:
    assert read_header(image).plain == plain
    decode_image(image)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (None, "no image"),
        (b"", "empty image"),
        (b"garbage, not an image", "unknown image format"),
        (b"\xff\xd8\xff\xe0", "unknown image format"),
        (encode(NOISE, "JPEG").data[:-60], "truncated or damaged image"),
        (encode(NOISE, "PNG").data[:200], "truncated or damaged image"),
        (encode(NOISE, "WEBP").data[:80], "truncated or damaged image"),
        (png_header(60000, 60000), "too many pixels"),
        (png_header(9000, 9000), "too many pixels"),
        (png_header(1000, 1000), "truncated or damaged image"),
    ],
)
def test_bad_bytes_have_a_reason(data: bytes | None, problem: str) -> None:
    with pytest.raises(ImageError, match=problem) as error:
        decode_image(ImageRef("uid-7", data))
    assert error.value.problem == problem
    assert "uid-7" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_jpeg_of_many_scans_is_refused_before_they_are_decoded() -> None:
    data = encode(NOISE, "JPEG", progressive=True).data
    assert decode_image(ImageRef("usual", data)).size == (40, 48)
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(
        ImageError, match=r"image 'bomb': truncated or damaged image \(a JPEG of 2\d\d scans; at most 100"
    ):
        decode_image(ImageRef("bomb", data[:-2] + last * 200 + data[-2:]))


def test_limit_on_pixels_is_inclusive_and_read_from_the_header() -> None:
    assert decode_image(encode(NOISE), max_pixels=48 * 40).size == (40, 48)
    with pytest.raises(ImageError, match="40×48 exceeds max_pixels=1919"):
        decode_image(encode(NOISE), max_pixels=1919)


def test_damaged_bytes_raise_nothing_else() -> None:
    generator = np.random.default_rng(1)
    for fmt in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = encode(NOISE, fmt).data
        for _ in range(100):
            data = np.frombuffer(whole, np.uint8).copy()
            where = generator.integers(0, min(len(data), int(generator.choice([64, 100_000]))), 6)
            data[where] = generator.integers(0, 256, 6)
            try:
                decode_image(ImageRef("key", data.tobytes()), max_pixels=10**6)
            except ImageError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("loop/x.png", "path outside the root|missing file"),
        ("a.png\0.jpg", "path outside the root|missing file"),
        ("x" * 5000, "path outside the root|missing file"),
        ("absent.png", "missing file"),
        (".", "not a file"),
        ("pipe", "not a file"),
        ("empty.png", "empty image"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    """``test_paths.py`` has the paths that lead elsewhere."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=problem):
        decode_image(ImageRef(name[:40], path=tmp_path / name, root=tmp_path))


@pytest.mark.parametrize("resize", ["stretch", "center_crop"])
@pytest.mark.parametrize("shape", [(48, 40, 3), (1, 1, 3), (10, 240, 3), (250, 10, 3)])
def test_pixels_have_the_size_asked_for(resize: str, shape: tuple[int, ...]) -> None:
    pixels = PixelLoader(24, 32, resize)(encode(np.full(shape, (0, 128, 255), np.uint8)))
    assert pixels.shape == (3, 24, 32)
    assert pixels.dtype == torch.float32
    expected = torch.tensor([-1.0, (128 / 255 - 0.5) / 0.5, 1.0]).view(3, 1, 1).expand(3, 24, 32)
    torch.testing.assert_close(pixels, expected)


def test_stretch_keeps_all_and_center_crop_keeps_the_middle() -> None:
    bars = np.zeros((10, 30, 3), np.uint8)
    bars[:, 10:20] = 255
    assert PixelLoader(10, 10, "stretch")(encode(bars))[0, 0].min() < -0.9
    assert PixelLoader(10, 10, "center_crop")(encode(bars)).min() == 1.0


def test_own_size_is_not_resampled() -> None:
    for resize in ("stretch", "center_crop"):
        pixels = PixelLoader(48, 40, resize)(encode(NOISE))
        torch.testing.assert_close(pixels, torch.from_numpy(NOISE).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("read", [decode_image, read_header])
def test_latents_are_no_image(read) -> None:
    with pytest.raises(InputError, match=r"image 'a' holds latents.*latentreward cache"):
        read(ImageRef("a", b"\x93NUMPY", holds="latents"))


SCANS = b"\xff\xda\x00\x08" * 300


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


JPEG, PNG = encode(NOISE, "JPEG").data, encode(NOISE, "PNG").data
LONG = zlib.compress(bytes(2**20 + 1))


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:2] + segment(0xED, SCANS) + JPEG[2:],
        JPEG[:2] + segment(0xE1, SCANS) * 20 + segment(0xFE, SCANS) + JPEG[2:],
        JPEG + SCANS,  # the video of a motion photo
        JPEG + JPEG * 120,
        encode(NOISE, "JPEG", restart_marker_rows=1).data,
        encode(NOISE, "JPEG", progressive=True).data,
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


def test_a_text_that_unpacks_to_more_than_an_image_is_damage() -> None:
    data = PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26 + 1))) + PNG[33:]
    with pytest.raises(ImageError, match="truncated or damaged"):
        decode_image(ImageRef("a", data))


def test_a_png_of_too_many_pixels_is_refused_with_long_texts_too() -> None:
    large = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = PNG[:8] + chunk(b"IHDR", large) + chunk(b"iCCP", b"p\0\0" + LONG) + PNG[33:]
    with pytest.raises(ImageError, match="too many pixels"):
        decode_image(ImageRef("a", data))
