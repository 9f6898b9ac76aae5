"""Random scenes for captions: mutations contradict the caption, nuisances lower the picture's quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from latentreward.tinyworld.captions import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SHAPES, SIZES, Caption
from latentreward.tinyworld.rendering import IMAGE_SIZE, shape_distance
from latentreward.tinyworld.scenes import Blob, Item, Nuisances, Scene


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
    return {"left": (-along, across), "right": (along, across), "top": (across, -along), "bottom": (across, along)}[
        side
    ]


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
