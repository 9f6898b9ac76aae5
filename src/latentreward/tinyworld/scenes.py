"""Scenes of the tiny world: what they are worth for a caption, random ones, and their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from latentreward.tinyworld.captions import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SHAPES, SIZES, Caption

SIZE_BORDER = 6.4  # Smallest radius in pixels of a large shape


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

    The items, in any order, are matched to the caption's shapes in the order with the most correct attributes. Of two
    shapes that have exchanged their places only the relation is wrong.
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

    It is 1.0 if the first picture is preferred, 0.0 if the second, and 0.5, a tie, for a gap of utility below 0.15.
    """
    gap = utility_a - utility_b
    if abs(gap) < 0.15:
        return 0.5
    return float((0.5 if rng is None else rng.random()) < 1.0 / (1.0 + np.exp(-2.0 * gap)))


IMAGE_SIZE = 32  # Height and width of every picture, in pixels

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
MAX_FADE = 0.65  # Share of a shape's contrast that a contrast nuisance of strength 1 removes
MAX_GRADIENT = 0.35  # Change in gray level (0 to 1) over 32 pixels along a background gradient of strength 1


def shape_distance(shape: str, x: np.ndarray | float, y: np.ndarray | float, radius: float) -> np.ndarray | float:
    """Compute the signed distance in pixels of points to the outline of a shape at the origin, negative inside.

    Shapes of one radius look equally large. Outside a corner, the distance is that to the half-planes, so that corners
    stay sharp. The triangle points up, and its centroid is the origin.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.88 * radius
    if shape == "triangle":
        return np.maximum(y, ax * np.sqrt(0.75) - 0.5 * y) - 0.65 * radius
    long, short = 1.05 * radius, 0.38 * radius  # of a cross
    return np.minimum(np.maximum(ax - long, ay - short), np.maximum(ax - short, ay - long))


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


def draw_scene(
    caption: Caption,
    rng: np.random.Generator,
    mutation_shares: Sequence[float] = (0.45, 0.35, 0.2),
    clean_share: float = 0.45,
) -> Scene:
    """Draw a random scene for a caption, with random mutations and nuisances.

    ``mutation_shares`` are the probabilities of 0, 1, 2, ... mutations: attributes of the caption that the scene gets
    wrong. ``clean_share`` is the probability of a scene without nuisances.
    """
    names = ["color", "shape", "background", "count", *([] if caption.kind == "two" else ["detail"])]
    if caption.kind == "relation":
        names = ["color", "shape", "background", "detail", "count", "binding"]
    number = int(rng.choice(len(mutation_shares), p=list(mutation_shares)))
    chosen = [names[i] for i in rng.permutation(len(names))[:number]]
    depicted = caption
    for name in chosen:
        depicted = _mutate(depicted, name, rng)
    items = _place_items(depicted, rng, miscounted="count" in chosen)
    return Scene(depicted.background, items, _draw_nuisances(items, rng, clean_share))


def _mutate(caption: Caption, name: str, rng: np.random.Generator) -> Caption:
    """Return ``caption`` with attribute ``name`` changed; ``count`` is left to ``_place_items``."""
    if name == "binding":
        return replace(caption, color=caption.other_color, other_color=caption.color)
    if name == "detail" and caption.kind == "relation":
        # Exchange the two shapes, or change the axis: both make the relation wrong.
        if rng.random() < 0.5:
            names = {"color": "other_color", "shape": "other_shape", "other_color": "color", "other_shape": "shape"}
            return replace(caption, **{new: getattr(caption, old) for new, old in names.items()})
        return replace(caption, detail=_another(RELATIONS, caption.detail, rng))
    if name == "detail":
        return replace(caption, detail=_another(SIZES if caption.kind == "size" else POSITIONS, caption.detail, rng))
    options = {"color": COLORS, "shape": SHAPES, "background": BACKGROUNDS}
    if name in options:
        attribute = (
            f"other_{name}" if caption.kind == "relation" and name != "background" and rng.random() < 0.5 else name
        )
        return replace(caption, **{attribute: _another(options[name], getattr(caption, attribute), rng)})
    return caption


def _another(options: Sequence[str], current: str, rng: np.random.Generator) -> str:
    remaining = [option for option in options if option != current]
    return remaining[int(rng.integers(len(remaining)))]


def _place_items(depicted: Caption, rng: np.random.Generator, miscounted: bool) -> tuple[Item, ...]:
    if (depicted.count == 2) != miscounted:
        return _place_pair(depicted, rng)
    thing = (depicted.color, depicted.shape)
    if depicted.kind == "size":
        low, high, jitter = (4.0, 4.8, 4.0) if depicted.detail == "small" else (8.0, 9.5, 1.5)
        dx, dy = rng.uniform(-jitter, jitter, 2)
        return (Item(*thing, 16 + dx, 16 + dy, rng.uniform(low, high)),)
    side = depicted.detail if depicted.kind == "position" else POSITIONS[int(rng.integers(4))]
    dx, dy = _offset(side, rng.uniform(6.0, 8.0), rng.uniform(-2.5, 2.5))
    return (Item(*thing, 16 + dx, 16 + dy, rng.uniform(4.8, 5.8)),)


def _place_pair(depicted: Caption, rng: np.random.Generator) -> tuple[Item, ...]:
    """Place two shapes on opposite sides of the middle, the first on the caption's side or on a random side."""
    if depicted.kind == "position":
        side = depicted.detail
    elif depicted.kind == "relation":
        side = {"left of": "left", "above": "top"}[depicted.detail]
    else:
        side = POSITIONS[int(rng.integers(4))]
    first = (depicted.color, depicted.shape)
    other = (depicted.other_color, depicted.other_shape) if depicted.kind == "relation" else first
    if depicted.kind in ("size", "position") and rng.random() < 0.5:
        other = (_another(COLORS, depicted.color, rng), SHAPES[int(rng.integers(len(SHAPES)))])
    items = []
    for sign, thing in ((1, first), (-1, other)):
        dx, dy = _offset(side, rng.uniform(6.7, 8.2), rng.uniform(-2.5, 2.5))
        items.append(Item(*thing, 16 + sign * dx, 16 + sign * dy, rng.uniform(4.0, 4.9)))
    return tuple(items)


def _offset(side: str, along: float, across: float) -> tuple[float, float]:
    sign = 1 if side in ("right", "bottom") else -1
    return (sign * along, across) if side in ("left", "right") else (across, sign * along)


def _draw_nuisances(items: Sequence[Item], rng: np.random.Generator, clean_share: float) -> Nuisances:
    if rng.random() < clean_share:
        return Nuisances()
    kinds = set(rng.permutation(3)[: 1 + int(rng.random() < 0.25)].tolist())
    contrast, gradient = rng.uniform(0.35, 1.0, 2)
    blobs: list[Blob] = []
    number = int(rng.integers(2, 7)) if 2 in kinds else 0
    for _ in range(60 if number else 0):  # blobs touch neither a shape nor each other; fewer if there is no room
        x, y = rng.uniform(2.5, IMAGE_SIZE - 2.5, 2)
        radius = rng.uniform(1.7, 2.3)
        free = all(shape_distance(item.shape, x - item.x, y - item.y, item.radius) > radius + 1.5 for item in items)
        if free and all((x - b.x) ** 2 + (y - b.y) ** 2 > (radius + b.radius + 1.5) ** 2 for b in blobs):
            blobs.append(Blob(str(rng.choice(COLORS)), float(x), float(y), float(radius)))
        if len(blobs) == number:
            break
    return Nuisances(
        contrast=float(contrast) if 0 in kinds else 0.0,
        gradient=float(gradient) if 1 in kinds else 0.0,
        angle=float(rng.uniform(0, 2 * np.pi)),
        blobs=tuple(blobs),
    )
