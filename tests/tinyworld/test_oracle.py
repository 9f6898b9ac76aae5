"""The judge sees what was drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.tinyworld.captions import draw_caption
from latentreward.tinyworld.oracle import detect_scene, judge, mean_verdict, utility_scores
from latentreward.tinyworld.scenes import Item, Nuisances, Scene, alignment_checks, draw_scene, render, scene_utility


@pytest.mark.slow
def test_oracle_agrees_with_the_scenes() -> None:
    rng = np.random.default_rng(1)
    truths, judged, right, clean = [], [], [], []
    for _ in range(300):
        caption = draw_caption(rng, "train")
        scene = draw_scene(caption, rng)
        picture = render(scene)
        seen = detect_scene(picture)
        truths.append(scene_utility(caption, scene))
        judged.append(judge(picture, caption.text).utility)
        expected = alignment_checks(caption, scene.background, scene.items)
        right.append(alignment_checks(caption, seen.background, seen.items) == expected)
        clean.append(scene.nuisances.quality == 1.0)
    truth_gap, judged_gap = np.subtract(truths[::2], truths[1::2]), np.subtract(judged[::2], judged[1::2])
    apart = np.abs(truth_gap) > 0.15
    assert np.mean(np.array(right)[np.array(clean)]) >= 0.985
    assert np.mean(right) >= 0.98
    assert np.corrcoef(truths, judged)[0, 1] >= 0.99
    assert (np.sign(truth_gap) == np.sign(judged_gap))[apart].mean() >= 0.99


def test_oracle_reads_a_scene_back() -> None:
    items = (Item("red", "triangle", 9.0, 15.0, 4.5), Item("cyan", "cross", 23.5, 17.0, 4.2))
    seen = detect_scene(render(Scene("gray", items, Nuisances(contrast=0.6, gradient=0.8, angle=1.0))))
    assert seen.background == "gray"
    for item in items:
        found = next(other for other in seen.items if other.color == item.color)
        assert found.shape == item.shape
        assert (found.x, found.y, found.radius) == pytest.approx((item.x, item.y, item.radius), abs=0.3)
    assert seen.nuisances.contrast == pytest.approx(0.6, abs=0.05)
    assert seen.nuisances.gradient == pytest.approx(0.8, abs=0.05)


def test_an_empty_picture_is_worth_little() -> None:
    verdict = judge(np.full((32, 32, 3), 240, np.uint8), "two red circles on a white background")
    assert verdict.alignment == 0.25
    assert verdict.quality == pytest.approx(0.2)
    assert not verdict.all_right


@pytest.mark.parametrize("seed", range(3))
def test_any_picture_gets_a_verdict(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert 0.0 <= judge(noise, "two red circles on a white background").utility <= 6.0


def test_scores_are_a_tensor_and_take_pil() -> None:
    picture = render(Scene("white", (Item("red", "circle", 16.0, 16.0, 4.4),)))
    captions = ["a small red circle on a white background"] * 2
    scores = utility_scores(captions, [picture, Image.fromarray(picture)])
    assert torch.equal(scores, torch.tensor([6.0, 6.0]))
    assert mean_verdict(captions, [picture, picture])["all_right"] == 1.0


def test_oracle_refuses_other_sizes() -> None:
    with pytest.raises(InputError, match=r"expected a \(32, 32, 3\) uint8 picture"):
        detect_scene(np.zeros((64, 64, 3), np.uint8))
