"""Intervals of accuracies on pairs that share pictures."""

import numpy as np
import pytest

from latentreward.metrics.bootstrap import clustered_accuracy, group_sums
from latentreward.metrics.shared_pictures import picture_accuracy, shared_groups


def test_groups_hang_together_by_common_names() -> None:
    links = [("a", "b"), ("c", "d"), ("e", "b"), ("f", "g"), ("d", "f", "x")]
    assert shared_groups(links).tolist() == [0, 1, 0, 1, 1]
    chain = [(str(n), str(n + 1)) for n in range(5000)]
    assert shared_groups(chain).max() == 0
    assert len(shared_groups([])) == 0


def test_pairs_of_their_own_pictures_are_independent() -> None:
    credit = np.array([1.0] * 30 + [0.0] * 10)
    found, over = picture_accuracy(credit, [(f"{n}a", f"{n}b") for n in range(40)])
    assert over == "groups of pictures" and found.groups == 40
    assert found == clustered_accuracy(group_sums(np.arange(40), credit, np.ones(40)))


def test_pairs_that_share_pictures_tell_less() -> None:
    """Each picture of 10 is right in all its pairs or in none: 10 independent facts, not 100."""
    rng = np.random.default_rng(0)
    links = [(f"a{i}", f"b{j}") for i in range(10) for j in range(10)]
    good = rng.random(10) < 0.7
    credit = np.repeat(good, 10).astype(float)
    found, over = picture_accuracy(credit, links)
    independent, _ = picture_accuracy(credit, [(f"{n}a", f"{n}b") for n in range(100)])
    assert over == "pictures" and found.groups == 20 and found.value == independent.value == pytest.approx(good.mean())
    assert found.high - found.low > 2 * (independent.high - independent.low)
    assert found == picture_accuracy(credit, links)[0]


def test_all_right_does_not_mean_sure() -> None:
    found, _ = picture_accuracy(np.ones(12), [(f"{n}a", f"{n}b") for n in range(12)])
    assert found.value == found.high == 1.0 and 0.7 < found.low < 0.8


def test_the_interval_covers_the_true_share() -> None:
    """Pairs are right by how good their two pictures are; of 20 folders, nine in ten intervals hold the truth."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(20):
        skill = rng.normal(0, 0.8, 12)
        ends = [(i, j) for i in range(6) for j in range(6, 12)]
        credit = np.array([float(0.5 + skill[i] + skill[j] + rng.normal(0, 1) > 0) for i, j in ends])
        found, _ = picture_accuracy(credit, [(str(i), str(j)) for i, j in ends])
        held += found.low <= 0.6297 <= found.high  # P(N(0.5, 1 + 2·0.64) > 0) = Φ(0.5 / √2.28)
    assert held >= 18
