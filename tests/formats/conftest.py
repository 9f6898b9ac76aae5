"""Samples of the published formats: the committed ones, or those of another folder of the same layout."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COMMITTED = Path(__file__).parent / "data"
SAMPLES = Path(os.environ.get("LATENTREWARD_SAMPLES_DIR") or COMMITTED)


def expected_of(name: str) -> dict[str, Any]:
    """What the samples' EXPECTED.json says of a format."""
    return json.loads((SAMPLES / "EXPECTED.json").read_text())[name]


def encode(
    mode: str = "RGB", size: tuple[int, int] = (40, 30), fmt: str = "JPEG", seed: int = 0, **options: Any
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()
