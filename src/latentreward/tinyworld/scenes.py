"""Scenes of the tiny world, and their utility for a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from latentreward.tinyworld.captions import Caption

SIZE_BORDER = 6.4
"""Smallest radius in pixels of a large shape."""


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
    """Defects that lower the quality of a picture."""

    contrast: float = 0.0  # strength of the loss of contrast, in [0, 1]
    gradient: float = 0.0  # strength of the background gradient, in [0, 1]
    angle: float = 0.0  # direction of the gradient in radians
    blobs: tuple[Blob, ...] = ()  # dots that no caption asks for

    @property
    def quality(self) -> float:
        """Quality of the picture in [0, 1]: 1 minus a weighted sum of the nuisances."""
        return 1.0 - min(1.0, 0.8 * self.contrast + 0.8 * self.gradient + 0.14 * len(self.blobs))


@dataclass(frozen=True)
class Scene:
    """Complete description of a picture: background, shapes and nuisances."""

    background: str
    items: tuple[Item, ...]
    nuisances: Nuisances = field(default_factory=Nuisances)


def picture_utility(alignment: float, quality: float) -> float:
    """Compute the utility of a picture, 0 to 6, from its alignment and quality in [0, 1]."""
    return 4.0 * alignment + 2.0 * quality


def alignment_checks(caption: Caption, background: str, items: Sequence[Item]) -> dict[str, bool]:
    """Check which attributes of a caption a picture gets right.

    The items, in any order, are matched to the caption's shapes in the order with the most correct attributes. If two
    shapes have exchanged their positions, only the relation is wrong; if they have exchanged their colours, both
    colours are wrong.

    Returns:
        Name of an attribute → whether the picture gets it right; four to seven entries.
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
        checks["position"] = first is not None and direction(first.x - 16, first.y - 16) == caption.detail
    else:
        checks["other_color"] = second is not None and second.color == caption.other_color
        checks["other_shape"] = second is not None and second.shape == caption.other_shape
        side = {"left of": "left", "above": "top"}[caption.detail]
        checks["relation"] = None not in (first, second) and direction(first.x - second.x, first.y - second.y) == side
    return checks


def direction(dx: float, dy: float) -> str:
    """Return the name of the main direction of an offset in pixels; ``center`` for less than 3 pixels."""
    if max(abs(dx), abs(dy)) < 3:
        return "center"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def scene_alignment(caption: Caption, scene: Scene) -> float:
    """Compute the share of a caption's attributes that a scene gets right."""
    checks = alignment_checks(caption, scene.background, scene.items)
    return sum(checks.values()) / len(checks)


def scene_utility(caption: Caption, scene: Scene) -> float:
    """Compute the utility of a scene for a caption, 0 to 6, without label noise."""
    return picture_utility(scene_alignment(caption, scene), scene.nuisances.quality)


def draw_label(utility_a: float, utility_b: float, rng: np.random.Generator | None) -> float:
    """Draw a noisy label from the Bradley-Terry model with log-odds of 2 per unit of utility; without ``rng`` no noise.

    A utility gap below 0.15 gives a tie.

    Returns:
        1.0 if the first picture is preferred, 0.0 if the second, 0.5 for a tie.
    """
    gap = utility_a - utility_b
    if abs(gap) < 0.15:
        return 0.5
    return float((0.5 if rng is None else rng.random()) < 1.0 / (1.0 + np.exp(-2.0 * gap)))
