"""Photographs as cameras write them: pixels as the sensor saw them, and an EXIF tag that says how they are held."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

ON_ITS_SIDE = 6


def photograph(
    orientation: int = ON_ITS_SIDE, width: int = 48, height: int = 32, fmt: str = "JPEG", seed: int = 0
) -> bytes:
    """An image file of ``width`` × ``height`` stored pixels with an EXIF orientation."""
    levels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    exif[ExifTags.Base.Orientation] = orientation
    stream = io.BytesIO()
    image.save(stream, fmt, exif=exif)
    return stream.getvalue()


def upright(data: bytes) -> Image.Image:
    """The photograph as it should be seen, stored so, by Pillow's own function."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def write_jsonl(root: Path) -> Path:
    """Four pairs of photographs that lie on their side, of one's own."""
    rows = []
    for number in range(4):
        names = [f"{number}{side}.jpg" for side in "ab"]
        for place, name in enumerate(names):
            (root / name).write_bytes(photograph(seed=2 * number + place))
        rows.append({"prompt": f"a cat {number}", "image_a": names[0], "image_b": names[1], "label": 1.0})
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "own.jsonl"
