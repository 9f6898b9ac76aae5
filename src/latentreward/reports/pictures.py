"""Conversion of images and figures to data URIs, to embed them in HTML pages."""

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

from latentreward.reports.drawing import animate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture_uri(image: Image.Image, side: int = 256, quality: int = 80) -> str:
    """Convert an image to a JPEG data URI, shrunk so that no side is longer than ``side`` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def clip_uri(frames: Sequence[Image.Image], fps: float, side: int = 256, quality: int = 80) -> str:
    """Convert the frames of a clip to the data URI of an animated WebP, shrunk as by :func:`picture_uri`."""
    small = [frame.convert("RGB") for frame in frames]
    for frame in small:
        frame.thumbnail((side, side), Image.Resampling.LANCZOS)
    return f"data:image/webp;base64,{base64.b64encode(animate(small, fps, quality=quality)).decode()}"


def figure_uri(figure: "Figure") -> str:
    """Convert a matplotlib figure to an SVG data URI; equal figures give equal bytes.

    Create the figure by ``matplotlib.figure.Figure``, not by pyplot, so that no display is needed.
    """
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "latentreward"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
