"""Pictures inside a page, as data URIs."""

import base64
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture_uri(image: Image.Image, side: int = 256, quality: int = 80) -> str:
    """A JPEG of ``image``, no side longer than ``side`` pixels; it is never enlarged."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure_uri(figure: "Figure") -> str:
    """An SVG of a matplotlib figure, the same bytes each time; ``matplotlib.figure.Figure`` needs no display."""
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "latentreward"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
