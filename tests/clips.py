"""Clips for tests: mp4 files whose frames are of known solid colours."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

MILLISECOND = Fraction(1, 1000)


def write_clip(
    path: Path, reds: Sequence[int], times: Sequence[int] | None = None, fps: int = 16, size: int = 32, **options: str
) -> Path:
    """Write an mp4 file of solid colours: the red of each frame, shown from its time in milliseconds on."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream: Any = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 1_000_000
        stream.codec_context.time_base = Fraction(1, fps) if times is None else MILLISECOND
        for number, red in enumerate(reds):
            picture = np.zeros((size, size, 3), np.uint8)
            picture[..., 0] = red
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (number, Fraction(1, fps)) if times is None else (times[number], MILLISECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
