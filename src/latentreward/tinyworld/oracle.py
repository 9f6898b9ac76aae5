"""A judge that reads the scene from a picture's pixels and computes the picture's utility for a caption.

The judge is for pictures without a known scene: generated pictures, and drawn pictures after the autoencoder. It has
five steps: a plane fitted to the colourless pixels (background and gradient), the distance from that plane
(foreground), connected components (large components are shapes, small ones are blobs), the direction of each shape's
colour away from the background (colour and contrast), and the overlap with templates (shape).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.tinyworld.captions import SHAPES, parse_caption
from latentreward.tinyworld.scenes import (
    BACKGROUND_LEVELS,
    COLOR_VALUES,
    IMAGE_SIZE,
    MAX_FADE,
    MAX_GRADIENT,
    MIDDLES,
    Blob,
    Item,
    Nuisances,
    Scene,
    alignment_checks,
    picture_utility,
    shape_coverage,
)

MIN_SHAPE_AREA = 23  # Smallest area of a shape in pixels; blobs cover at most 17
MIN_BLOB_AREA = 4  # Smallest area of a blob in pixels; smaller components count as noise
FOREGROUND_DISTANCE = 0.09  # Smallest RGB distance of a foreground pixel from the background, with channels in [0, 1]
MIN_STRENGTH = 0.17
"""Measured nuisance strength below which a nuisance counts as absent; drawn nuisances have at least 0.35."""
AREA_FACTORS = {shape: float(shape_coverage(shape, 16, 16, 10).sum()) / 100 for shape in SHAPES}
"""Area in pixels of each shape of radius 1."""


@dataclass(frozen=True)
class Verdict:
    """Judgement of a picture for a caption."""

    alignment: float  # share of the caption's attributes that the picture gets right, in [0, 1]
    all_right: bool  # whether the picture gets all attributes right
    quality: float  # 1 minus a weighted sum of the defects (low contrast, background gradient, blobs), in [0, 1]
    utility: float  # ``4 * alignment + 2 * quality``


def judge(picture: np.ndarray | Image.Image, caption: str) -> Verdict:
    """Judge a picture ``(32, 32, 3)``, uint8 or PIL, for a caption of the tiny world."""
    scene = detect_scene(picture)
    checks = alignment_checks(parse_caption(caption), scene.background, scene.items)
    alignment = sum(checks.values()) / len(checks)
    quality = scene.nuisances.quality
    return Verdict(alignment, all(checks.values()), quality, picture_utility(alignment, quality))


def utility_scores(captions: Sequence[str], pictures: Sequence[np.ndarray | Image.Image]) -> torch.Tensor:
    """Compute the utilities ``(N,)``, float32, of pictures for their captions; usable as a pixel scorer."""
    return torch.tensor([judge(p, c).utility for c, p in zip(captions, pictures, strict=True)])


def mean_verdict(captions: Sequence[str], pictures: Sequence[np.ndarray | Image.Image]) -> dict[str, float]:
    """Compute the means of ``alignment``, ``all_right``, ``quality`` and ``utility`` over pictures."""
    verdicts = [judge(p, c) for c, p in zip(captions, pictures, strict=True)]
    names = ("alignment", "all_right", "quality", "utility")
    return {name: float(np.mean([getattr(verdict, name) for verdict in verdicts])) for name in names}


def detect_scene(picture: np.ndarray | Image.Image) -> Scene:
    """Detect the scene in a picture ``(32, 32, 3)``, uint8 or PIL.

    Blobs (small dots that no caption asks for) are returned with position and size; their colour is always ``red``.
    """
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or pixels.dtype != np.uint8:
        raise InputError(f"expected a ({IMAGE_SIZE}, {IMAGE_SIZE}, 3) uint8 picture, got {pixels.shape} {pixels.dtype}")
    pixels = pixels / 255.0
    plane, level, slope = _fit_background(pixels)
    difference = pixels - plane[..., None]
    # A foreground pixel is far from the background, and at least 45 % as far as each neighbour, so that blurred edges
    # do not join two shapes.
    distance = np.sqrt((difference**2).sum(axis=-1))
    foreground = (distance > FOREGROUND_DISTANCE) & (distance > 0.45 * _largest_around(distance))
    items, blobs, contrasts = [], [], []
    for mask in _components(foreground):
        area = mask.sum()
        if area >= MIN_SHAPE_AREA:
            item, contrast = _read_item(mask, difference, plane)
            items.append(item)
            contrasts.append(contrast)
        elif area >= MIN_BLOB_AREA:
            y, x = np.argwhere(mask).mean(axis=0) + 0.5
            blobs.append(Blob("red", float(x), float(y), float(np.sqrt(area / np.pi))))
    # Without any visible shape, the contrast nuisance has its full strength.
    nuisances = Nuisances(
        contrast=_denoise(float(np.mean(contrasts)) if contrasts else 1.0),
        gradient=_denoise(slope * IMAGE_SIZE / MAX_GRADIENT),
        blobs=tuple(blobs),
    )
    levels = {
        name: BACKGROUND_LEVELS[name] + MAX_GRADIENT * nuisances.gradient * middle for name, middle in MIDDLES.items()
    }
    return Scene(min(BACKGROUND_LEVELS, key=lambda name: abs(levels[name] - level)), tuple(items), nuisances)


def _denoise(strength: float) -> float:
    return min(1.0, strength) if strength >= MIN_STRENGTH else 0.0


def _fit_background(pixels: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Fit a plane ``(32, 32)`` of gray levels to the colourless pixels, then again without outliers.

    It is returned with its gray level in the middle, and its slope per pixel.
    """
    grid_y, grid_x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5 - IMAGE_SIZE / 2
    design = np.stack([np.ones_like(grid_x), grid_x, grid_y], axis=-1).reshape(-1, 3)
    gray = pixels.mean(axis=-1).ravel()
    chroma = np.ptp(pixels, axis=-1).ravel()
    inside = chroma < max(0.08, float(np.quantile(chroma, 0.2)))
    inside &= np.abs(gray - np.median(gray[inside])) < 0.3
    for _ in range(2):
        weights = np.linalg.lstsq(design[inside], gray[inside], rcond=None)[0]
        residual = np.abs(design @ weights - gray)
        inside = (chroma < 0.08) & (residual < max(0.05, 2 * float(np.median(residual[inside]))))
        if inside.sum() < 60:
            break
    plane = (design @ weights).reshape(IMAGE_SIZE, IMAGE_SIZE)
    return plane, float(weights[0]), float(np.hypot(weights[1], weights[2]))


def _largest_around(values: np.ndarray) -> np.ndarray:
    """Return the largest of each value ``(32, 32)`` and its eight neighbours."""
    padded = np.pad(values, 1)
    return np.max([padded[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y in range(3) for x in range(3)], axis=0)


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Return a mask for each 4-connected component of ``mask``."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.max(
            [padded[1:-1, 1:-1], padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2]], axis=0
        )
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _read_item(mask: np.ndarray, difference: np.ndarray, plane: np.ndarray) -> tuple[Item, float]:
    """Read one shape from its mask ``(32, 32)``, and the strength of its contrast nuisance, not clipped to [0, 1]."""
    padded = np.pad(mask, 1)
    core = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    core = core if core.any() else mask
    offset, level = difference[core].mean(axis=0), plane[core].mean()
    fits = {}
    for name, rgb in COLOR_VALUES.items():
        direction = np.asarray(rgb) - level
        kept = float(offset @ direction / (direction @ direction))
        fits[name] = (float(np.linalg.norm(offset - kept * direction)) if kept > 0 else np.inf, kept)
    color = min(fits, key=lambda name: fits[name][0])
    near = _largest_around(mask)
    coverage = np.where(near, np.clip(difference @ offset / (offset @ offset), 0.0, 1.0), 0.0)
    # The coverage is compared with a template of each shape that has its area and centroid.
    grid_y, grid_x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    area = coverage.sum()
    x, y = float((coverage * grid_x).sum() / area), float((coverage * grid_y).sum() / area)
    radii = {shape: float(np.sqrt(area / AREA_FACTORS[shape])) for shape in SHAPES}
    templates = {shape: shape_coverage(shape, x, y, radii[shape]) for shape in SHAPES}
    overlaps = {s: np.minimum(coverage, t).sum() / np.maximum(coverage, t).sum() for s, t in templates.items()}
    shape = max(SHAPES, key=lambda name: overlaps[name])
    return Item(color, shape, x, y, radii[shape]), (1.0 - fits[color][1]) / MAX_FADE
