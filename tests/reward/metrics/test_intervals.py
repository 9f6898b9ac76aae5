"""Correlations against torchmetrics, double loops and closed forms; accuracies on pairs that share pictures."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from latentreward.core.bootstrap import wilson_ends
from latentreward.reward.metrics.intervals import (
    average_ranks,
    clustered_correlation,
    picture_accuracy,
    same_order,
    shared_groups,
)

ORACLES = {"spearman": spearman_corrcoef, "pearson": pearson_corrcoef}


def related(number: int, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=number)
    y = 0.6 * x + 0.8 * rng.normal(size=number)
    return (x.round(1), y.round(0)) if ties else (x, y)


def test_ranks_equal_a_double_loop() -> None:
    values = np.random.default_rng(0).integers(0, 7, 40).astype(float)
    ranks = [1 + (values < value).sum() + ((values == value).sum() - 1) / 2 for value in values]
    np.testing.assert_array_equal(average_ranks(values), ranks)


@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.parametrize("ties", [False, True])
def test_equals_torchmetrics(kind, ties) -> None:
    x, y = related(300, ties=ties)
    expected = ORACLES[kind](torch.from_numpy(x), torch.from_numpy(y)).item()
    assert clustered_correlation(x, y, np.arange(300), kind).value == pytest.approx(expected, abs=1e-6)


def test_large_offsets_lose_no_digits() -> None:
    x, y = related(300)
    shifted = clustered_correlation(1e6 + 1e-3 * x, y, np.arange(300), "pearson")
    assert shifted == pytest.approx(clustered_correlation(x, y, np.arange(300), "pearson"), abs=1e-5)


def test_ranks_alone_matter_to_spearman() -> None:
    x, y = related(200)
    value = clustered_correlation(np.exp(3 * x), y**3, np.arange(200), "spearman").value
    assert value == pytest.approx(clustered_correlation(x, y, np.arange(200), "spearman").value)
    assert clustered_correlation(x, -np.exp(x), np.arange(200), "spearman").value == pytest.approx(-1)


def test_interval_of_pearson_is_fishers() -> None:
    x, y = related(3000, seed=1)
    value, low, high, _ = clustered_correlation(x, y, np.arange(3000), "pearson")
    ends = np.tanh(np.arctanh(value) + np.array([-1.96, 1.96]) / np.sqrt(2997))
    np.testing.assert_allclose([low, high], ends, atol=0.004)


def test_spearmans_ends_are_those_of_ranking_anew() -> None:
    x, y = related(400, seed=2)
    _, low, high, _ = clustered_correlation(x, y, np.arange(400), "spearman")
    rng = np.random.default_rng(0)
    values = []
    for _ in range(1500):
        rows = rng.integers(400, size=400)
        values.append(np.corrcoef(average_ranks(x[rows]), average_ranks(y[rows]))[0, 1])
    np.testing.assert_allclose([low, high], np.percentile(values, [2.5, 97.5]), atol=0.012)


@pytest.mark.parametrize("kind", ORACLES)
def test_edge_cases(kind) -> None:
    x, y = related(50)
    with_nan = np.concatenate([x, [np.nan, 3.0]]), np.concatenate([y, [1.0, np.nan]])
    groups = np.arange(52)
    assert clustered_correlation(*with_nan, groups, kind) == clustered_correlation(x, y, groups[:50], kind)
    assert np.isnan(clustered_correlation(np.full(50, 0.1), y, groups[:50], kind)[:3]).all()
    assert np.isnan(clustered_correlation(x[:0], y[:0], groups[:0], kind)[:3]).all()
    assert np.isnan(clustered_correlation(x[:1], y[:1], groups[:1], kind)[:3]).all()


def test_same_order() -> None:
    gap, other = np.array([1.0, -1.0, 0.0, 0.0, 2.0, np.nan]), np.array([3.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(same_order(gap, other), [1, 0, 1, 0, 0, np.nan])


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
