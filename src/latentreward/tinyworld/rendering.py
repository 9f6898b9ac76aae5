"""Rendering of scenes to pixels: anti-aliased shapes from signed distances."""

from __future__ import annotations

import numpy as np

from latentreward.tinyworld.captions import SHAPES
from latentreward.tinyworld.scenes import Scene

IMAGE_SIZE = 32
"""Height and width of every picture, in pixels."""

COLOR_VALUES: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.15, 0.15),
    "yellow": (0.95, 0.85, 0.12),
    "green": (0.14, 0.66, 0.22),
    "cyan": (0.15, 0.80, 0.84),
    "blue": (0.17, 0.27, 0.90),
    "purple": (0.63, 0.18, 0.76),
}
"""RGB values in [0, 1] of each colour."""
BACKGROUND_LEVELS: dict[str, float] = {"black": 0.06, "gray": 0.5, "white": 0.94}
"""Gray level in [0, 1] of each background."""
MIDDLES = {"black": 0.5, "gray": 0.0, "white": -0.5}
"""Background → share of a gradient in the picture's middle: a gradient lightens black and darkens white."""
MAX_FADE = 0.65
"""Share of a shape's contrast that a contrast nuisance of strength 1 removes."""
MAX_GRADIENT = 0.35
"""Change in gray level (0 to 1) over 32 pixels along a background gradient of strength 1."""


def shape_distance(shape: str, x: np.ndarray | float, y: np.ndarray | float, radius: float) -> np.ndarray | float:
    """Compute the signed distance in pixels of points to the outline of a shape at the origin, negative inside.

    Shapes of one radius look equally large. Outside a corner, the distance is that to the half-planes, so that corners
    stay sharp. The triangle points up, and its centroid is the origin.

    Raises:
        ValueError: If the tiny world has no such shape.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.88 * radius
    if shape == "triangle":
        return np.maximum(y, ax * np.sqrt(0.75) - 0.5 * y) - 0.65 * radius
    if shape == "cross":
        long, short = 1.05 * radius, 0.38 * radius
        return np.minimum(np.maximum(ax - long, ay - short), np.maximum(ax - short, ay - long))
    raise ValueError(f"unknown shape {shape!r}; the tiny world has {', '.join(SHAPES)}")


def shape_coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Compute the share of each pixel that a shape covers, ``(32, 32)`` in [0, 1], as an anti-aliased mask."""
    grid_y, grid_x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    return np.clip(0.5 - shape_distance(shape, grid_x - x, grid_y - y, radius), 0.0, 1.0)


def render(scene: Scene) -> np.ndarray:
    """Render a scene as an RGB picture ``(32, 32, 3)``, uint8."""
    nuisances = scene.nuisances
    grid_y, grid_x = (np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5) / IMAGE_SIZE - 0.5
    ramp = np.cos(nuisances.angle) * grid_x + np.sin(nuisances.angle) * grid_y
    level = BACKGROUND_LEVELS[scene.background] + MAX_GRADIENT * nuisances.gradient * (ramp + MIDDLES[scene.background])
    canvas = np.clip(level, 0.0, 1.0)[..., None].repeat(3, axis=-1)
    strength = 1.0 - MAX_FADE * nuisances.contrast
    for item in scene.items:
        coverage = strength * shape_coverage(item.shape, item.x, item.y, item.radius)[..., None]
        canvas = canvas * (1 - coverage) + coverage * np.asarray(COLOR_VALUES[item.color])
    for blob in nuisances.blobs:
        coverage = shape_coverage("circle", blob.x, blob.y, blob.radius)[..., None]
        canvas = canvas * (1 - coverage) + coverage * np.asarray(COLOR_VALUES[blob.color])
    return np.round(canvas * 255).astype(np.uint8)
