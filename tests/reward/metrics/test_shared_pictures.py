"""Intervals of accuracies on pairs that share pictures."""

from statistics import NormalDist

import numpy as np
import pytest

from latentreward.core.bootstrap import wilson_ends
from latentreward.reward.metrics.shared_pictures import picture_accuracy, shared_groups


def test_groups_hang_together_by_common_names() -> None:
    links = [("a", "b"), ("c", "d"), ("e", "b"), ("f", "g"), ("d", "f", "x")]
    assert shared_groups(links).tolist() == [0, 1, 0, 1, 1]
    chain = [(str(n), str(n + 1)) for n in range(5000)]
    assert shared_groups(chain).max() == 0
    assert len(shared_groups([])) == 0


def test_pairs_of_their_own_pictures_are_independent() -> None:
    credit = np.array([1.0] * 15 + [0.0] * 10)
    found = picture_accuracy(credit, [(f"{n}a", f"{n}b") for n in range(25)])
    assert (found.low, found.high) == pytest.approx(wilson_ends(0.6, 25)) and found.groups == 25
    assert np.isnan(picture_accuracy(np.empty(0), []).low)


def test_pairs_that_share_pictures_tell_less() -> None:
    """Each picture of 10 is right in all its pairs or in none: 10 independent facts, not 100."""
    links = [(f"a{i}", f"b{j}") for i in range(10) for j in range(10)]
    credit = np.repeat(np.arange(10) < 7, 10).astype(float)
    found = picture_accuracy(credit, links)
    assert found.value == 0.7 and found.groups == 10
    assert (found.low, found.high) == pytest.approx(wilson_ends(0.7, 10), abs=0.005)
    mixed = picture_accuracy(np.random.default_rng(0).permutation(credit), links)
    assert mixed.groups > 50


def test_all_right_does_not_mean_sure() -> None:
    found = picture_accuracy(np.ones(12), [(f"{n}a", f"{n}b") for n in range(12)])
    assert found.value == found.high == 1.0 and 0.7 < found.low < 0.8 and found.groups == 12
    assert picture_accuracy(np.ones(36), [(f"{n}a", f"{m}b") for n in range(6) for m in range(6)]).groups == 6


@pytest.mark.parametrize(
    "ends",
    [
        [(2 * n, 2 * n + 1) for n in range(25)],
        [(n % 10, 10 + (n + n // 10) % 10) for n in range(50)],
        [(8 * block + i, 8 * block + j) for block in range(4) for i in range(8) for j in range(i)],
    ],
    ids=["apart", "all against all", "blocks"],
)
def test_the_interval_covers_the_true_share(ends: list[tuple[int, int]]) -> None:
    """Pairs are right by how good their two pictures are; of 300 folders, nine in ten intervals hold the truth."""
    rng = np.random.default_rng(1)
    first, second = np.array(ends).T
    links = [(str(i), str(j)) for i, j in ends]
    held = 0
    for _ in range(300):
        skill = rng.normal(0, 0.5, second.max() + first.max() + 1)
        credit = (0.4 + skill[first] + skill[second] + rng.normal(0, 1, len(ends)) > 0).astype(float)
        found = picture_accuracy(credit, links)
        held += found.low <= NormalDist(0, 1.5**0.5).cdf(0.4) <= found.high
    assert held >= 270
