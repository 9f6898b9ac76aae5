"""Clustered bootstrap: plain loops, closed forms, coverage, edge cases."""

from statistics import NormalDist

import numpy as np
import pytest

from latentreward.core.bootstrap import (
    MANY,
    Interval,
    bootstrap_interval,
    clustered_accuracy,
    clustered_interval,
    clustered_mean,
    group_codes,
    group_sums,
    ratio,
    ratio_difference,
    resample_sums,
)

Z = NormalDist().inv_cdf(0.975)


def draw_groups(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Credits of pairs whose groups differ in size and in difficulty, and the number of each pair's group."""
    sizes = rng.integers(1, 12, groups)
    index = np.repeat(np.arange(groups), sizes)
    return (rng.random(len(index)) < rng.beta(4, 2, groups)[index]).astype(float), index


def test_copies_of_a_row_in_its_group_are_no_evidence() -> None:
    credit, index = (np.random.default_rng(3).random(200) < 0.6).astype(float), np.arange(200)
    once, four_times = clustered_mean(credit, index), clustered_mean(np.tile(credit, 4), np.tile(index, 4))
    assert four_times == pytest.approx(once)
    independent = clustered_mean(np.tile(credit, 4), np.arange(800))
    assert independent.high - independent.low == pytest.approx((once.high - once.low) / 2, rel=0.1)


def test_paired_differences_are_narrower_than_those_of_other_prompts() -> None:
    rng = np.random.default_rng(4)
    hard = rng.random(1000)
    first, second = (hard < 0.7).astype(float), (hard < 0.6).astype(float)
    ones, index = np.ones(1000), np.arange(1000)
    paired = clustered_interval(group_sums(index, first, ones, second, ones), ratio_difference)
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired == pytest.approx(clustered_mean(first - second, index), abs=0.002)
    assert paired.low > 0
    apart = [clustered_mean(credit, index) for credit in (first, second)]
    assert paired.high - paired.low < 0.6 * np.hypot(*(item.high - item.low for item in apart))


def test_centred_intervals_hold_values_that_resampling_inflates() -> None:
    def distance(sums: np.ndarray) -> np.ndarray:
        return np.abs(sums[..., 1:]).sum(-1) / sums[..., 0]

    noise = np.random.default_rng(6).normal(size=(400, 10))
    sums = np.concatenate([np.ones((400, 1)), noise - 0.98 * noise.mean(axis=0)], axis=1)
    plain, centred = clustered_interval(sums, distance), clustered_interval(sums, distance, centred=True)
    assert plain.low > plain.value
    assert centred.low < centred.value < centred.high


def test_nothing_has_no_value_and_one_group_no_ends() -> None:
    assert np.isnan(clustered_interval(np.empty((0, 2)))[:3]).all()
    value, low, high, groups = clustered_interval(np.array([[3.0, 4.0]]))
    assert (value, groups) == (0.75, 1)
    assert np.isnan([low, high]).all()
    assert np.isnan(ratio(np.zeros(2)))


@pytest.mark.parametrize(
    ("share", "groups", "low", "high"),
    [(1.0, 6, 0.6097, 1.0), (0.0, 6, 0.0, 0.3903), (0.5, 10, 0.2366, 0.7634), (1.0, 500, 0.9924, 1.0)],
)
def test_equal_groups_have_the_score_interval_of_as_many_answers(
    share: float, groups: int, low: float, high: float
) -> None:
    """Ends from Newcombe's tables of Wilson's interval; several pairs of a group are one answer."""
    sums = np.array([[share * pairs, pairs] for pairs in np.arange(groups) % 3 + 1.0])
    assert clustered_accuracy(sums) == pytest.approx((share, low, high, groups), abs=1e-4)
    assert clustered_interval(sums)[:3] == (share, share, share)


def test_groups_that_differ_have_the_interval_of_the_bootstrap() -> None:
    for sums in (np.array([[1.0, 1.0]] * 5 + [[0.0, 1.0]]), np.array([[3.0, 3.0], [1.0, 2.0]]), np.ones((1, 2))):
        np.testing.assert_array_equal(clustered_accuracy(sums), clustered_interval(sums))
    np.testing.assert_array_equal(clustered_accuracy(np.empty((0, 2))), clustered_interval(np.empty((0, 2))))


def test_two_levels_of_resampling_keep_their_results() -> None:
    one = bootstrap_interval([np.random.default_rng(1).normal(size=50)])
    assert one == Interval(-0.03607807742830817, -0.284573044634976, 0.19840947250583785, 50)
    three = bootstrap_interval([np.random.default_rng(seed).normal(size=40) for seed in range(3)])
    assert three == Interval(-0.01800124914518982, -0.17679116918180895, 0.14309424484159855, 40)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    truth, held, runs = 4 / 6, 0, 400
    rng = np.random.default_rng(7)
    for seed in range(runs):
        credit, index = draw_groups(rng, 120)
        sums = group_sums(index, credit, np.ones(len(credit)))
        _, low, high, _ = clustered_interval(sums, resamples=600, seed=seed)
        held += low <= truth <= high
    assert 0.91 <= held / runs <= 0.98


def test_groups_are_numbered_by_name_however_they_are_given() -> None:
    names = ["b", "Ä", "a", "10", "9", "b", "", "日本", "a"]
    expected = np.unique(np.array(names), return_inverse=True)[1]
    for given in (names, tuple(names), np.array(names), np.array(names, dtype=object), expected, 3 * expected - 5):
        np.testing.assert_array_equal(group_codes(given), expected)
    assert group_codes([]).tolist() == group_codes(np.zeros(0, dtype=int)).tolist() == []
    assert group_sums([], np.zeros(0), np.zeros(0)).shape == (0, 2)


def test_many_groups_are_resampled_in_bundles_with_the_same_spread() -> None:
    """The interval of a ratio whose groups differ in size, against its normal approximation."""
    rng = np.random.default_rng(9)
    weight = rng.integers(1, 4, MANY + 1)
    values = np.sort(rng.exponential(size=MANY + 1))  # bundles of neighbours would vary too much
    estimate = clustered_interval(np.stack([values * weight, weight], axis=1))
    assert estimate.value == pytest.approx((values * weight).sum() / weight.sum())
    assert estimate.groups == MANY + 1
    half = Z * np.linalg.norm((values - estimate.value) * weight) / weight.sum()
    assert (estimate.low, estimate.high) == pytest.approx(
        (estimate.value - half, estimate.value + half), abs=0.1 * half
    )


def test_totals_of_resamples_are_those_of_plain_draws() -> None:
    """The order of the random numbers is promised, so that intervals can be computed again elsewhere."""
    sums = np.random.default_rng(10).normal(size=(700, 3))
    drawn = np.random.default_rng(4).integers(700, size=(200, 700))
    np.testing.assert_allclose(resample_sums(sums, 200, seed=4), sums[drawn].sum(axis=1), atol=1e-10)
