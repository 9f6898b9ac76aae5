"""Scenes to edit, results of edits that are right or wrong in four ways, and preference pairs of such results."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from latentreward.tinyworld.captions import draw_caption
from latentreward.tinyworld.drawing import draw_scene
from latentreward.tinyworld.edits import KINDS, Edit, edit_splits, edited, possible_edits, scene_verdict
from latentreward.tinyworld.scenes import Scene, draw_label

RESULTS = {"right": 0.3, "unchanged": 0.15, "another edit": 0.1, "overdone": 0.25, "drawn anew": 0.2}
"""Kinds of results → probability that a pair's first picture is of this kind; the second is of another kind."""
PAIRS_PER_SOURCE = 2
"""Number of pairs of each scene and instruction."""


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
