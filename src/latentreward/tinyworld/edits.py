"""Edits of the tiny world: instructions, what they make of a scene, a judge of results, and pairs of results.

An instruction names a shape by its colour, which no other shape of the scene has. The judge tells apart whether a
result follows the instruction and how much of the rest of the picture it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, permutations, product

import numpy as np
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.tinyworld.captions import BACKGROUNDS, COLORS, POSITIONS, SHAPES, draw_caption, split_texts
from latentreward.tinyworld.oracle import detect_scene
from latentreward.tinyworld.scenes import IMAGE_SIZE, Item, Scene, direction, draw_label, draw_scene

KINDS = ("color", "shape", "move", "add", "remove", "background")  # Kinds of instructions
WORDS = {"left": "left", "right": "right", "top": "up", "bottom": "down"}
"""Side that a shape is moved to → word in the instruction."""
STEP = 7.0  # Pixels by which a shape is moved
REACH = 1.3  # Largest distance of a shape's point from its centre, in radii
MAX_SHIFT = 1.5  # Largest distance in pixels by which the centre of a shape that stays may differ
MAX_GROWTH = 0.2  # Largest share by which the radius of a shape that stays may differ


@dataclass(frozen=True)
class Edit:
    """Attributes of an instruction."""

    kind: str  # one of ``KINDS``
    color: str = ""  # colour of the shape that is edited; empty for ``background``
    shape: str = ""  # name of this shape
    detail: str = ""  # new colour, shape or background, or side to move to; empty for ``add`` and ``remove``

    @property
    def text(self) -> str:
        """Text of the instruction, at most 8 words."""
        thing = f"{self.color} {self.shape}"
        return {
            "color": f"change the {thing} to {self.detail}",
            "shape": f"change the {thing} to a {self.detail}",
            "move": f"move the {thing} {WORDS.get(self.detail)}",
            "add": f"add a second {thing}",
            "remove": f"remove the {thing}",
            "background": f"make the background {self.detail}",
        }[self.kind]


@dataclass(frozen=True)
class EditVerdict:
    """Judgement of the result of an edit."""

    followed: bool  # whether the result shows what the instruction asks for
    kept: float  # share of the attributes that the edit leaves alone which are as in the source, in [0, 1]

    @property
    def utility(self) -> float:
        """Utility of the result, 0 to 4."""
        return 2.0 * self.followed + 2.0 * self.kept


@lru_cache(maxsize=1)
def all_edits() -> dict[str, Edit]:
    """Return all edits by their texts: 120 of kind ``color``, 72 ``shape``, 96 ``move``, twice 24, 3 ``background``."""
    things = list(product(COLORS, SHAPES))
    found = [Edit("color", c, s, new) for (c, s), new in product(things, COLORS) if new != c]
    found += [Edit("shape", c, s, new) for (c, s), new in product(things, SHAPES) if new != s]
    found += [Edit("move", c, s, side) for (c, s), side in product(things, POSITIONS)]
    found += [Edit(kind, c, s) for kind, (c, s) in product(("add", "remove"), things)]
    found += [Edit("background", detail=background) for background in BACKGROUNDS]
    return {edit.text: edit for edit in found}


def parse_edit(text: str) -> Edit:
    """Return the edit with a text."""
    text = str(text)  # without the pictures of a prompt
    if text not in all_edits():
        raise InputError(f"not an edit of the tiny world: {text[:80]!r}; see latentreward.tinyworld.edits.all_edits()")
    return all_edits()[text]


@lru_cache(maxsize=1)
def edit_splits() -> dict[str, dict[str, tuple[Edit, ...]]]:
    """Return edits by split and kind: of each kind 10 % for ``test``, 10 % for ``validation``, 80 % for ``train``.

    The three edits of the background are in all splits.
    """
    splits: dict[str, dict[str, tuple[Edit, ...]]] = {"train": {}, "validation": {}, "test": {}}
    for kind in KINDS:
        texts = [text for text, edit in all_edits().items() if edit.kind == kind]
        parts = dict.fromkeys(splits, texts) if kind == "background" else split_texts(texts, b"edit split")
        for split, part in parts.items():
            splits[split][kind] = tuple(all_edits()[text] for text in part)
    return splits


def edited(scene: Scene, edit: Edit) -> Scene | None:
    """Return a scene after an edit; None where the edit cannot be made.

    It can be made if the shape that it names is the scene's only one of its colour, and the new scene is another one
    whose shapes lie apart from each other and inside the picture. A second shape is added opposite the first one.
    """
    if edit.kind == "background":
        return None if scene.background == edit.detail else replace(scene, background=edit.detail)
    places = [place for place, item in enumerate(scene.items) if item.color == edit.color]
    if len(places) != 1 or scene.items[places[0]].shape != edit.shape:
        return None
    item, items = scene.items[places[0]], list(scene.items)
    if edit.kind == "remove":
        del items[places[0]]
    elif edit.kind == "add":
        items.append(replace(item, x=IMAGE_SIZE - item.x, y=IMAGE_SIZE - item.y))
    elif edit.kind == "move":
        sign = 1 if edit.detail in ("right", "bottom") else -1
        axis = "x" if edit.detail in ("left", "right") else "y"
        items[places[0]] = replace(item, **{axis: getattr(item, axis) + sign * STEP})
    else:
        items[places[0]] = replace(item, **{edit.kind: edit.detail})
    if edit.kind in ("add", "move"):
        edges = (min(item.x, item.y, IMAGE_SIZE - item.x, IMAGE_SIZE - item.y) for item in items)
        if any(edge < item.radius for edge, item in zip(edges, items, strict=True)):
            return None
    apart = all(
        math.hypot(one.x - other.x, one.y - other.y) > REACH * (one.radius + other.radius) + 1
        for one, other in combinations(items, 2)
    )
    return replace(scene, items=tuple(items)) if apart else None


def possible_edits(scene: Scene) -> list[Edit]:
    """Return all edits that can be made on a scene."""
    return [edit for edit in all_edits().values() if edited(scene, edit) is not None]


def scene_verdict(source: Scene, result: Scene, edit: Edit) -> EditVerdict:
    """Judge a scene as the result of an edit of another scene.

    Attributes of a shape are its colour, shape, place and radius, matched in the order with the most right ones.
    Further attributes are the background, and that there are no shapes but those asked for.
    """
    stay = [item for item in source.items if edit.kind != "remove" or item.color != edit.color]
    found = [*result.items, *[None] * len(stay)]
    checks = (_checks(stay, order, result, edit) for order in permutations(found, len(stay)))
    done, kept = max(checks, key=lambda lists: sum(map(sum, lists)))
    if edit.kind == "background":
        done = [result.background == edit.detail]
    else:
        kept = [*kept, result.background == source.background]
    return EditVerdict(bool(done) and all(done), sum(kept) / len(kept))


def _checks(
    stay: Sequence[Item], order: Sequence[Item | None], result: Scene, edit: Edit
) -> tuple[list[bool], list[bool]]:
    """Check the shapes of a result, matched in an order; return the checks of what was asked for, and of the rest."""
    done, kept = list[bool](), list[bool]()
    touched = {"move": "place"}.get(edit.kind, edit.kind)
    for item, found in zip(stay, order, strict=True):
        right = dict.fromkeys(("color", "shape", "place", "radius"), False)
        if found is not None:
            right["color"], right["shape"] = found.color == item.color, found.shape == item.shape
            right["place"] = math.hypot(found.x - item.x, found.y - item.y) <= MAX_SHIFT
            right["radius"] = abs(found.radius / item.radius - 1) <= MAX_GROWTH
        if item.color == edit.color and touched in right:
            del right[touched]
            value = None if found is None else getattr(found, touched, direction(found.x - item.x, found.y - item.y))
            done.append(value == edit.detail)
        kept += right.values()
    rest = [item for item in result.items if not any(item is found for found in order)]
    if edit.kind == "add":
        done.append(any((item.color, item.shape) == (edit.color, edit.shape) for item in rest))
    if edit.kind == "remove":
        done.append(all(item.color != edit.color for item in result.items))
        rest = [item for item in rest if item.color != edit.color]
    kept.append(len(rest) <= (edit.kind == "add"))
    return done, kept


def judge_edit(source: np.ndarray | Image.Image, result: np.ndarray | Image.Image, instruction: str) -> EditVerdict:
    """Judge a picture as the result of an edit of another one; both ``(32, 32, 3)``, uint8 or PIL."""
    edit = parse_edit(instruction)
    return scene_verdict(detect_scene(source), detect_scene(result), edit)


RESULTS = {"right": 0.3, "unchanged": 0.15, "another edit": 0.1, "overdone": 0.25, "drawn anew": 0.2}
"""Kinds of results → probability that a pair's first picture is of this kind; the second is of another kind."""
PAIRS_PER_SOURCE = 2  # Number of pairs of each scene and instruction


@dataclass(frozen=True)
class EditPair:
    """Two results of one edit; ``label`` is 1.0 if the first is preferred, 0.0 if the second, 0.5 for a tie."""

    source: Scene
    edit: Edit
    results: tuple[Scene, Scene]
    kinds: tuple[str, str]  # those of ``RESULTS``
    label: float


def draw_edit(split: str, rng: np.random.Generator) -> tuple[Scene, Edit]:
    """Draw an edit of a split, all kinds equally likely, and a scene without defects on which it can be made."""
    kinds = edit_splits()[split]
    edits = kinds[KINDS[int(rng.integers(len(KINDS)))]]
    edit = edits[int(rng.integers(len(edits)))]
    return _draw_source(edit, rng), edit


def _draw_source(edit: Edit, rng: np.random.Generator) -> Scene:
    """Draw scenes of captions, one of whose shapes becomes the one that the edit names, until it can be made."""
    while True:
        caption = draw_caption(rng, "train")
        if caption.kind == "two":  # both shapes have one colour, so that no edit could name one
            continue
        scene = draw_scene(caption, rng, mutation_shares=(1.0,), clean_share=1.0)
        if edit.color:
            items = list(scene.items)
            place = int(rng.integers(len(items)))
            items[place] = replace(items[place], color=edit.color, shape=edit.shape)
            scene = replace(scene, items=tuple(items))
        if edited(scene, edit) is not None:
            return scene


def draw_results(source: Scene, edit: Edit, rng: np.random.Generator) -> dict[str, Scene]:
    """Draw a result of each kind of an edit of a scene.

    ``another edit`` is the result of another instruction. ``overdone`` is the right result after one or two further
    edits that the instruction does not ask for. ``drawn anew`` is the right result of the edit of another scene.
    """
    right, fresh = _made(source, edit), _made(_draw_source(edit, rng), edit)
    others = [other for other in possible_edits(source) if other != edit]
    another = _made(source, others[int(rng.integers(len(others)))])
    overdone = right
    for _ in range(1 + int(rng.integers(2))):
        further = possible_edits(overdone)
        for place in rng.permutation(len(further)):
            spoilt = _made(overdone, further[place])
            verdict = scene_verdict(source, spoilt, edit)
            if verdict.followed and verdict.kept < 1:
                overdone = spoilt
                break
    return dict(zip(RESULTS, (right, source, another, overdone, fresh), strict=True))


def _made(scene: Scene, edit: Edit) -> Scene:
    result = edited(scene, edit)
    assert result is not None
    return result


def draw_edit_pairs(split: str, number: int, rng: np.random.Generator, noisy: bool = True) -> list[EditPair]:
    """Make random pairs of results, :data:`PAIRS_PER_SOURCE` for each scene and instruction.

    ``noisy`` draws labels as :func:`~latentreward.tinyworld.scenes.draw_label` does; otherwise the result of greater
    utility is preferred.
    """
    pairs: list[EditPair] = []
    while len(pairs) < number:
        source, edit = draw_edit(split, rng)
        results = draw_results(source, edit, rng)
        for _ in range(PAIRS_PER_SOURCE):
            first, second = rng.choice(list(RESULTS), 2, replace=False, p=list(RESULTS.values())).tolist()
            shown = results[first], results[second]
            one, other = (scene_verdict(source, scene, edit).utility for scene in shown)
            label = draw_label(one, other, rng) if noisy else 0.5 * (1.0 + np.sign(one - other))
            pairs.append(EditPair(source, edit, shown, (first, second), float(label)))
    return pairs[:number]
