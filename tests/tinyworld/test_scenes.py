"""Captions, their splits, scenes and what they are worth."""

from dataclasses import replace

import numpy as np
import pytest

from latentreward.tinyworld.captions import (
    KIND_SHARES,
    Caption,
    all_captions,
    caption_splits,
    draw_caption,
    held_out_captions,
    parse_caption,
)
from latentreward.tinyworld.scenes import (
    IMAGE_SIZE,
    Item,
    Nuisances,
    Scene,
    alignment_checks,
    draw_label,
    draw_scene,
    render,
    scene_alignment,
    scene_utility,
)

RELATION = Caption("relation", "red", "circle", "white", "left of", "blue", "square")
LEFT, RIGHT = Item("red", "circle", 9.0, 16.0, 4.5), Item("blue", "square", 23.0, 16.0, 4.5)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_captions_read_as_sentences() -> None:
    assert RELATION.text == "a red circle left of a blue square on a white background"
    assert Caption("two", "cyan", "cross", "gray").text == "two cyan crosses on a gray background"
    assert Caption("size", "green", "square", "black", "large").text == "a large green square on a black background"
    assert parse_caption(RELATION.text) == RELATION


def test_splits_partition_the_captions() -> None:
    splits = {name: [c.text for kind in kinds.values() for c in kind] for name, kinds in caption_splits().items()}
    together = [text for texts in splits.values() for text in texts]
    assert len(together) == len(set(together)) == len(all_captions()) == 3384
    assert len(splits["test"]) == len(splits["validation"]) == 338
    for kinds in caption_splits().values():
        assert set(kinds) == set(KIND_SHARES)


def test_held_out_captions_are_of_the_test_split() -> None:
    texts = {c.text for kind in caption_splits()["test"].values() for c in kind}
    assert set(held_out_captions(100, seed=1)) <= texts
    assert held_out_captions(5, seed=1) == held_out_captions(5, seed=1) != held_out_captions(5, seed=2)


@pytest.mark.parametrize(
    ("background", "items", "wrong"),
    [
        ("white", (LEFT, RIGHT), set()),
        ("white", (RIGHT, LEFT), set()),
        ("gray", (LEFT, RIGHT), {"background"}),
        ("white", (LEFT,), {"count", "other_color", "other_shape", "relation"}),
        ("white", (replace(LEFT, x=23.0), replace(RIGHT, x=9.0)), {"relation"}),
        ("white", (replace(LEFT, color="blue"), replace(RIGHT, color="red")), {"color", "other_color"}),
        ("white", (LEFT, replace(RIGHT, shape="cross")), {"other_shape"}),
        ("white", (), {"count", "color", "shape", "other_color", "other_shape", "relation"}),
    ],
)
def test_wrong_attributes_are_named(background: str, items: tuple[Item, ...], wrong: set[str]) -> None:
    checks = alignment_checks(RELATION, background, items)
    assert {name for name, right in checks.items() if not right} == wrong
    assert len(checks) == 7


def test_utility_of_a_hand_made_scene() -> None:
    scene = Scene("gray", (LEFT, RIGHT), Nuisances(contrast=0.5))
    assert scene_alignment(RELATION, scene) == pytest.approx(6 / 7)
    assert scene_utility(RELATION, scene) == pytest.approx(4 * 6 / 7 + 2 * 0.6)


def test_unmutated_scenes_are_all_right_and_mutated_ones_are_not(rng: np.random.Generator) -> None:
    for _ in range(300):
        caption = draw_caption(rng, "train")
        assert scene_alignment(caption, draw_scene(caption, rng, mutation_shares=(1.0,))) == 1.0
        assert scene_alignment(caption, draw_scene(caption, rng, mutation_shares=(0.0, 1.0))) < 1.0


def test_drawing_is_deterministic() -> None:
    def draw(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.stack([render(draw_scene(draw_caption(rng, "train"), rng)) for _ in range(20)])

    assert np.array_equal(draw(3), draw(3))
    assert not np.array_equal(draw(3), draw(4))
    assert draw(3).shape == (20, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert draw(3).dtype == np.uint8


def test_labels_follow_bradley_terry(rng: np.random.Generator) -> None:
    labels = [draw_label(3.0, 2.5, rng) for _ in range(4000)]
    assert np.mean(labels) == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.025)
    assert draw_label(3.0, 2.9, rng) == 0.5


def test_label_noise_leaves_a_ceiling_of_87_percent(rng: np.random.Generator) -> None:
    gaps, labels = [], []
    for _ in range(3000):
        caption = draw_caption(rng, "train")
        first, second = (scene_utility(caption, draw_scene(caption, rng)) for _ in range(2))
        gaps.append(first - second)
        labels.append(draw_label(first, second, rng))
    gaps, labels = np.array(gaps), np.array(labels)
    untied = labels != 0.5
    assert 1 - untied.mean() == pytest.approx(0.125, abs=0.02)
    assert ((gaps > 0) == (labels == 1.0))[untied].mean() == pytest.approx(0.870, abs=0.02)
