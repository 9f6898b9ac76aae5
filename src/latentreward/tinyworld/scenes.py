"""A 32x32 world of coloured shapes: captions, scenes, images, and what a picture is worth.

A caption names one or two shapes. A scene is what a picture shows: shapes that agree with a caption or were mutated away
from it, and nuisances that make it ugly. Every draw takes a ``numpy.random.Generator``, so a seed fixes every pixel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

import numpy as np

IMAGE_SIZE = 32
"""Height and width of every picture, in pixels."""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.15, 0.15),
    "yellow": (0.95, 0.85, 0.12),
    "green": (0.14, 0.66, 0.22),
    "cyan": (0.15, 0.80, 0.84),
    "blue": (0.17, 0.27, 0.90),
    "purple": (0.63, 0.18, 0.76),
}
"""RGB in [0, 1]."""
BACKGROUNDS: dict[str, float] = {"black": 0.06, "gray": 0.5, "white": 0.94}
"""Gray level in [0, 1]."""
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
POSITIONS = ("top", "bottom", "left", "right")
RELATIONS = ("left of", "above")
KIND_SHARES = {"size": 0.25, "position": 0.25, "relation": 0.35, "two": 0.15}
MUTATION_SHARES = (0.45, 0.35, 0.2)
"""Share of drawn pictures with 0, 1 and 2 mutations."""
SIZE_BORDER = 6.4
"""Radius in pixels from which a shape is large."""
MAX_FADE = 0.65
"""Share of a shape's contrast that nuisance strength 1 takes away."""
MAX_GRADIENT = 0.35
"""Gray levels (of 1) that a background gradient of strength 1 spans along the longest axis."""


@dataclass(frozen=True)
class Caption:
    """What a caption asks for.

    Attributes:
        kind: One of ``size``, ``position``, ``relation``, ``two``.
        color: Colour of the (first) shape.
        shape: Name of the (first) shape.
        background: Name of the background.
        detail: The size, position or relation; empty for ``two``.
        other_color: Colour of the second shape of a ``relation``, else empty.
        other_shape: Name of the second shape of a ``relation``, else empty.
    """

    kind: str
    color: str
    shape: str
    background: str
    detail: str = ""
    other_color: str = ""
    other_shape: str = ""

    @property
    def text(self) -> str:
        """The caption as a sentence of at most 12 words."""
        thing = f"{self.color} {self.shape}"
        subject = {
            "size": f"a {self.detail} {thing}",
            "position": f"a {thing} at the {self.detail}",
            "relation": f"a {thing} {self.detail} a {self.other_color} {self.other_shape}",
            "two": f"two {thing}{'es' if self.shape == 'cross' else 's'}",
        }[self.kind]
        return f"{subject} on a {self.background} background"

    @property
    def count(self) -> int:
        """Number of shapes asked for."""
        return 2 if self.kind in ("relation", "two") else 1


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
        return picture_quality(self.contrast, self.gradient, len(self.blobs))


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows."""

    background: str
    items: tuple[Item, ...]
    nuisances: Nuisances = field(default_factory=Nuisances)


def picture_quality(contrast: float, gradient: float, blobs: int) -> float:
    """Quality in [0, 1] of a picture with nuisance strengths in [0, 1] and a number of blobs."""
    return 1.0 - min(1.0, 0.8 * contrast + 0.8 * gradient + 0.14 * blobs)


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


@lru_cache(maxsize=1)
def all_captions() -> dict[str, Caption]:
    """Every caption there is, by its text: 144 sizes, 288 positions, 2,880 relations, 72 twos."""
    found = [Caption("size", c, s, b, d) for c, s, b, d in product(COLORS, SHAPES, BACKGROUNDS, SIZES)]
    found += [Caption("position", c, s, b, d) for c, s, b, d in product(COLORS, SHAPES, BACKGROUNDS, POSITIONS)]
    found += [
        Caption("relation", c, s, b, d, c2, s2)
        for c, s, b, d, c2, s2 in product(COLORS, SHAPES, BACKGROUNDS, RELATIONS, COLORS, SHAPES)
        if c != c2
    ]
    found += [Caption("two", c, s, b) for c, s, b in product(COLORS, SHAPES, BACKGROUNDS)]
    return {caption.text: caption for caption in found}


def parse_caption(text: str) -> Caption:
    """Read a caption's text.

    Raises:
        ValueError: If this world has no such caption.
    """
    if text not in all_captions():
        raise ValueError(f"not a caption of the tiny world: {text!r}; see latentreward.tinyworld.scenes.all_captions()")
    return all_captions()[text]


@lru_cache(maxsize=1)
def caption_splits() -> dict[str, dict[str, tuple[Caption, ...]]]:
    """Captions by split, then by kind: 10 % of each kind for ``test``, 10 % for ``validation``, the rest for ``train``.

    The partition is fixed, so no picture a generator or a reward was trained on shares its caption with a held-out one.
    """
    splits: dict[str, dict[str, tuple[Caption, ...]]] = {"train": {}, "validation": {}, "test": {}}
    for kind in KIND_SHARES:
        captions = [caption for caption in all_captions().values() if caption.kind == kind]
        captions.sort(key=lambda caption: hashlib.blake2b(caption.text.encode(), key=b"caption split").digest())
        tenth = round(len(captions) / 10)
        splits["test"][kind] = tuple(captions[:tenth])
        splits["validation"][kind] = tuple(captions[tenth : 2 * tenth])
        splits["train"][kind] = tuple(captions[2 * tenth :])
    return splits


def draw_caption(rng: np.random.Generator, split: str) -> Caption:
    """Draw a caption of a split, its kind by ``KIND_SHARES``."""
    kind = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    captions = caption_splits()[split][kind]
    return captions[int(rng.integers(len(captions)))]


def draw_scene(
    caption: Caption,
    rng: np.random.Generator,
    mutation_shares: Sequence[float] = MUTATION_SHARES,
    clean_share: float = 0.45,
) -> Scene:
    """Draw a scene for a caption, right or mutated, clean or ugly.

    Args:
        caption: What is asked for.
        rng: Source of randomness.
        mutation_shares: Probability of 0, 1, 2, ... mutations.
        clean_share: Probability of no nuisance at all.
    """
    names = _mutations(caption)
    number = int(rng.choice(len(mutation_shares), p=list(mutation_shares)))
    chosen = [names[i] for i in rng.permutation(len(names))[:number]]
    depicted = caption
    for name in chosen:
        depicted = _mutate(depicted, name, rng)
    items = _place_items(depicted, rng, miscounted="count" in chosen)
    return Scene(depicted.background, items, _draw_nuisances(items, rng, clean_share))


def _mutations(caption: Caption) -> tuple[str, ...]:
    if caption.kind == "relation":
        return ("color", "shape", "background", "detail", "count", "binding")
    return ("color", "shape", "background", "count") + (("detail",) if caption.kind != "two" else ())


def _mutate(caption: Caption, name: str, rng: np.random.Generator) -> Caption:
    """The caption of a picture that gets one attribute of ``caption`` wrong (``count`` is up to the placing)."""
    if name == "binding":
        return replace(caption, color=caption.other_color, other_color=caption.color)
    if name == "detail" and caption.kind == "relation":
        # Opposite side, or the other axis: both make the relation wrong.
        if rng.random() < 0.5:
            names = dict(color="other_color", shape="other_shape", other_color="color", other_shape="shape")
            return replace(caption, **{new: getattr(caption, old) for new, old in names.items()})
        return replace(caption, detail=_another(RELATIONS, caption.detail, rng))
    if name == "detail":
        return replace(caption, detail=_another(SIZES if caption.kind == "size" else POSITIONS, caption.detail, rng))
    options = {"color": tuple(COLORS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}
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
    """Two shapes on opposite sides of the middle, the first on the side the caption names, else on a random one."""
    if depicted.kind == "position":
        side = depicted.detail
    elif depicted.kind == "relation":
        side = {"left of": "left", "above": "top"}[depicted.detail]
    else:
        side = POSITIONS[int(rng.integers(4))]
    other = (depicted.other_color, depicted.other_shape)
    if depicted.kind != "relation":
        other = (depicted.color, depicted.shape)
    if depicted.kind in ("size", "position") and rng.random() < 0.5:
        other = (_another(tuple(COLORS), depicted.color, rng), SHAPES[int(rng.integers(len(SHAPES)))])
    items = []
    for sign, thing in ((1, (depicted.color, depicted.shape)), (-1, other)):
        dx, dy = _offset(side, rng.uniform(6.7, 8.2), rng.uniform(-2.5, 2.5))
        items.append(Item(*thing, 16 + sign * dx, 16 + sign * dy, rng.uniform(4.0, 4.9)))
    return tuple(items)


def _offset(side: str, along: float, across: float) -> tuple[float, float]:
    return {"left": (-along, across), "right": (along, across), "top": (across, -along), "bottom": (across, along)}[
        side
    ]


def _draw_nuisances(items: Sequence[Item], rng: np.random.Generator, clean_share: float) -> Nuisances:
    if rng.random() < clean_share:
        return Nuisances()
    kinds = set(rng.permutation(3)[: 1 + int(rng.random() < 0.25)].tolist())
    contrast, gradient = rng.uniform(0.35, 1.0, 2)
    blobs = _draw_blobs(items, rng, int(rng.integers(2, 7))) if 2 in kinds else ()
    return Nuisances(
        contrast=float(contrast) if 0 in kinds else 0.0,
        gradient=float(gradient) if 1 in kinds else 0.0,
        angle=float(rng.uniform(0, 2 * np.pi)),
        blobs=blobs,
    )


def _draw_blobs(items: Sequence[Item], rng: np.random.Generator, number: int) -> tuple[Blob, ...]:
    """Up to ``number`` blobs that touch neither a shape nor each other; fewer where there is no room."""
    blobs: list[Blob] = []
    for _ in range(60):
        x, y = rng.uniform(2.5, IMAGE_SIZE - 2.5, 2)
        radius = rng.uniform(1.7, 2.3)
        free = all(shape_distance(item.shape, x - item.x, y - item.y, item.radius) > radius + 1.5 for item in items)
        if free and all((x - b.x) ** 2 + (y - b.y) ** 2 > (radius + b.radius + 1.5) ** 2 for b in blobs):
            blobs.append(Blob(str(rng.choice(list(COLORS))), float(x), float(y), float(radius)))
        if len(blobs) == number:
            break
    return tuple(blobs)


def shape_distance(shape: str, x: np.ndarray | float, y: np.ndarray | float, radius: float) -> np.ndarray | float:
    """Signed distance in pixels of points to the outline of a shape around the origin, negative inside.

    Sizes are chosen so that shapes of one radius look equally big; corners keep their sharpness (the distance outside
    a corner is that of the half-planes). The triangle points up and its centroid is the origin.
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
    """Share of each pixel that a shape covers, ``(32, 32)`` in [0, 1]: the anti-aliased mask."""
    grid_y, grid_x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    return np.clip(0.5 - shape_distance(shape, grid_x - x, grid_y - y, radius), 0.0, 1.0)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene.

    Returns:
        RGB picture ``(32, 32, 3)``, uint8.
    """
    nuisances = scene.nuisances
    canvas = _background(scene.background, nuisances)[..., None].repeat(3, axis=-1)
    strength = 1.0 - MAX_FADE * nuisances.contrast
    for item in scene.items:
        coverage = strength * shape_coverage(item.shape, item.x, item.y, item.radius)[..., None]
        canvas = canvas * (1 - coverage) + coverage * np.asarray(COLORS[item.color])
    for blob in nuisances.blobs:
        coverage = shape_coverage("circle", blob.x, blob.y, blob.radius)[..., None]
        canvas = canvas * (1 - coverage) + coverage * np.asarray(COLORS[blob.color])
    return np.round(canvas * 255).astype(np.uint8)


def _background(name: str, nuisances: Nuisances) -> np.ndarray:
    """Gray levels ``(32, 32)``; a gradient lightens black, darkens white and does both to gray."""
    grid_y, grid_x = (np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5) / IMAGE_SIZE - 0.5
    ramp = np.cos(nuisances.angle) * grid_x + np.sin(nuisances.angle) * grid_y
    middle = {"black": 0.5, "gray": 0.0, "white": -0.5}[name]
    return np.clip(BACKGROUNDS[name] + MAX_GRADIENT * nuisances.gradient * (ramp + middle), 0.0, 1.0)


def draw_label(
    utility_a: float, utility_b: float, rng: np.random.Generator, slope: float = 2.0, tie: float = 0.15
) -> float:
    """Draw a noisy preference by Bradley-Terry.

    Args:
        utility_a: Noiseless utility of the first picture.
        utility_b: Noiseless utility of the second picture.
        rng: Source of randomness.
        slope: Log-odds per unit of utility.
        tie: Utility gap below which judges call it a tie.

    Returns:
        1.0 if the first picture is preferred, 0.0 if the second, 0.5 for a tie.
    """
    gap = utility_a - utility_b
    if abs(gap) < tie:
        return 0.5
    return float(rng.random() < 1.0 / (1.0 + np.exp(-slope * gap)))
