"""Drawing of images side by side with captions and in grids, and conversion of images and figures to data URIs."""

import base64
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, WRONG, PLAIN = "#2e9e5b", "#d1495b", "#9aa0a6"
"""Colours of frames: of correctly predicted pairs, of wrongly predicted pairs, and of others."""
CLIP_FPS = 16  # Frames per second at which sampled clips are shown: that of Wan 2.1's training
SHOWN_FRAMES = 4  # Number of frames of a clip that a grid shows
MARGIN = 8  # Space between images, in pixels


def to_image(pixels: Tensor, size: int | None = None) -> Image.Image:
    """Convert pixels ``(3, H, W)``, about [-1, 1], to an RGB image, resized to ``size`` on its longer side if given."""
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
    scale = size / max(image.size) if size else 1
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def to_images(pixels: Tensor, size: int | None = None) -> list[Image.Image]:
    """Convert a clip ``(3, F, H, W)`` to one image per frame, or an image ``(3, H, W)`` to a list of one."""
    return [to_image(frame, size) for frame in (pixels.unbind(dim=1) if pixels.ndim == 4 else [pixels])]


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Draw :data:`SHOWN_FRAMES` frames of a clip, evenly spaced in time, side by side; an image stays as it is."""
    last, shown = len(frames) - 1, min(SHOWN_FRAMES, len(frames))
    chosen = [frames[round(place * last / max(shown - 1, 1))] for place in range(shown)]
    width, height = chosen[0].size
    picture = Image.new("RGB", (width * shown, height))
    for place, frame in enumerate(chosen):
        picture.paste(frame, (width * place, 0))
    return picture


def animate(frames: Sequence[Image.Image], fps: float = CLIP_FPS, **options: Any) -> bytes:
    """Return an animated WebP of the frames; ``options`` are settings of Pillow's encoder, such as ``lossless``."""
    ends = [round(1000 * number / fps) for number in range(len(frames) + 1)]
    durations = [end - start for start, end in pairwise(ends)]
    content = BytesIO()
    first, *others = frames
    first.save(content, "webp", save_all=True, append_images=others, duration=durations, loop=0, **options)
    return content.getvalue()


def draw_pair(images: Sequence[Image.Image], captions: Sequence[str], prompt: str, colour: str) -> Image.Image:
    """Draw one cell of a grid: the prompt, images side by side with a caption below each, and a frame of ``colour``."""
    font = _font()
    width = sum(image.width for image in images) + (len(images) + 1) * MARGIN
    height = max(image.height for image in images) + 52 + MARGIN
    cell = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(cell)
    draw.text((MARGIN, 6), cut(" ".join(prompt.split()), width - 2 * MARGIN), fill="black", font=font)
    left = MARGIN
    for image, caption in zip(images, captions, strict=True):
        cell.paste(image, (left, 26))
        draw.text((left, height - 24), cut(caption, image.width + MARGIN // 2), fill="black", font=font)
        left += image.width + MARGIN
    draw.rectangle((1, 1, width - 2, height - 2), outline=colour, width=3)
    return cell


def cut(text: str, width: float) -> str:
    """Cut a text so that it is at most ``width`` pixels wide; ``…`` marks the cut."""
    font = _font()
    if font.getlength(text) <= width:
        return text
    kept = bisect_right(range(1, len(text)), width, key=lambda length: font.getlength(f"{text[:length]}…"))
    return f"{text[:kept]}…"


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which matplotlib contains; Pillow's own font lacks even the dash ``–`` and the letter ``é``."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 10)


def tile(cells: list[Image.Image], columns: int) -> Image.Image:
    """Draw cells row by row in a grid of ``columns`` columns on white."""
    width, height = (max(getattr(cell, side) for cell in cells) + MARGIN for side in ("width", "height"))
    columns = min(columns, len(cells))
    picture = Image.new("RGB", (width * columns, height * -(-len(cells) // columns)), "white")
    for index, cell in enumerate(cells):
        picture.paste(cell, (width * (index % columns), height * (index // columns)))
    return picture


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
    """Convert a matplotlib figure to an SVG data URI; equal figures give equal bytes."""
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "latentreward"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
