"""What a tiny-world picture shows, and what that is worth for a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from latentreward.tinyworld.captions import Caption

SIZE_BORDER = 6.4
"""Radius in pixels from which a shape is large."""


@dataclass(frozen=True)
class Item:
    """One shape in a picture; ``x``, ``y`` (rightwards, downwards) and ``radius`` in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Blob:
    """A small coloured dot that no caption asks for; position and radius in pixels."""

    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Nuisances:
    """What makes a picture ugly; strengths in [0, 1], ``angle`` of the gradient in radians."""

    contrast: float = 0.0
    gradient: float = 0.0
    angle: float = 0.0
    blobs: tuple[Blob, ...] = ()

    @property
    def quality(self) -> float:
        """Quality in [0, 1]."""
        return 1.0 - min(1.0, 0.8 * self.contrast + 0.8 * self.gradient + 0.14 * len(self.blobs))


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows."""

    background: str
    items: tuple[Item, ...]
    nuisances: Nuisances = field(default_factory=Nuisances)


def picture_utility(alignment: float, quality: float) -> float:
    """Worth of a picture, 0 to 6: the number that preferences are drawn from."""
    return 4.0 * alignment + 2.0 * quality


def alignment_checks(caption: Caption, background: str, items: Sequence[Item]) -> dict[str, bool]:
    """Which attributes of a caption a picture gets right.

    The items are matched to the caption's shapes in the order that gets most attributes right, so swapping two
    shapes' places breaks their relation and nothing else, and swapping their colours breaks two colours.

    Args:
        caption: What is asked for.
        background: The picture's background.
        items: The picture's shapes, in any order.

    Returns:
        Attribute name to verdict; four to seven entries.
    """
    checks = {"background": background == caption.background, "count": len(items) == caption.count}
    if caption.kind == "two":
        checks["color"] = bool(items) and all(item.color == caption.color for item in items)
        checks["shape"] = bool(items) and all(item.shape == caption.shape for item in items)
        return checks
    padded = list(items) + [None] * (2 - len(items))
    orders = [(a, b) for i, a in enumerate(padded) for j, b in enumerate(padded) if i != j]
    return checks | max((_item_checks(caption, *order) for order in orders), key=lambda found: sum(found.values()))


def _item_checks(caption: Caption, first: Item | None, second: Item | None) -> dict[str, bool]:
    checks = {
        "color": first is not None and first.color == caption.color,
        "shape": first is not None and first.shape == caption.shape,
    }
    if caption.kind == "size":
        checks["size"] = first is not None and (first.radius >= SIZE_BORDER) == (caption.detail == "large")
    elif caption.kind == "position":
        checks["position"] = first is not None and _direction(first.x - 16, first.y - 16) == caption.detail
    else:
        checks["other_color"] = second is not None and second.color == caption.other_color
        checks["other_shape"] = second is not None and second.shape == caption.other_shape
        side = {"left of": "left", "above": "top"}[caption.detail]
        checks["relation"] = None not in (first, second) and _direction(first.x - second.x, first.y - second.y) == side
    return checks


def _direction(dx: float, dy: float) -> str:
    """Name of the dominant direction of an offset in pixels; ``center`` within 3 pixels."""
    if max(abs(dx), abs(dy)) < 3:
        return "center"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def scene_alignment(caption: Caption, scene: Scene) -> float:
    """Share of a caption's attributes that a scene gets right."""
    checks = alignment_checks(caption, scene.background, scene.items)
    return sum(checks.values()) / len(checks)


def scene_utility(caption: Caption, scene: Scene) -> float:
    """Noiseless utility of a scene for a caption, 0 to 6."""
    return picture_utility(scene_alignment(caption, scene), scene.nuisances.quality)


def draw_label(utility_a: float, utility_b: float, rng: np.random.Generator) -> float:
    """Draw a noisy preference by Bradley-Terry, with log-odds of 2 per unit of utility; a gap below 0.15 is a tie.

    Args:
        utility_a: Noiseless utility of the first picture.
        utility_b: Noiseless utility of the second picture.
        rng: Source of randomness.

    Returns:
        1.0 if the first picture is preferred, 0.0 if the second, 0.5 for a tie.
    """
    gap = utility_a - utility_b
    if abs(gap) < 0.15:
        return 0.5
    return float(rng.random() < 1.0 / (1.0 + np.exp(-2.0 * gap)))
