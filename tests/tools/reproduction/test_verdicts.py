"""Intervals of a difference over seeds and items against closed forms, and the word that they give."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from mpmath import betainc

from latentreward.errors import InputError
from tools.reproduction.measuring import Values
from tools.reproduction.results import STUDENT, crossed_interval, judge, student_interval

Z = NormalDist().inv_cdf(0.975)


def test_student() -> None:
    found = student_interval([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert found.high + found.low == pytest.approx(4.0)
    assert math.isnan(student_interval([1.0]).low)
    with pytest.raises(ValueError, match="11 runs"):
        student_interval([0.0] * 11)


def test_crossed_interval_of_items_alone_is_that_of_one_run() -> None:
    """All runs share the items, so more runs that agree make the interval no narrower."""
    items = np.random.default_rng(0).normal(0.5, 2.0, 2000)
    found = crossed_interval(np.stack([items] * 5))
    spread = Z * items.std() / math.sqrt(len(items))
    assert found.value == pytest.approx(items.mean())
    assert (found.high - found.low) / 2 == pytest.approx(spread, rel=0.05)


def test_crossed_interval_of_many_items() -> None:
    """More than 10 000 items are resampled in bundles, here of 2 and of 3 items."""
    items = np.random.default_rng(0).normal(5.0, 1.0, (1, 10_001))
    found = crossed_interval(items)
    assert (found.high - found.low) / 2 == pytest.approx(Z * items.std() / math.sqrt(items.size), rel=0.05)


def test_crossed_interval_of_runs_alone_is_that_of_their_means() -> None:
    """Of two runs both are drawn once half of the time, and one of them twice a quarter of the time each."""
    found = crossed_interval(np.array([[0.0] * 50, [1.0] * 50]))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_crossed_interval_adds_both_variances() -> None:
    rng = np.random.default_rng(1)
    runs, items = rng.normal(0, 1, 10), rng.normal(0, 30, 1000)
    found = crossed_interval(runs[:, None] + items)
    spread = Z * math.sqrt(runs.var() / 10 + items.var() / 1000)
    assert (found.high - found.low) / 2 == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    ("means", "more_than", "word"),
    [
        ((0.9, 1.0, 1.1), 0.0, "holds"),
        ((-0.9, -1.0, -1.1), 0.0, "does not hold"),
        ((0.9, 1.0, 1.1), 1.0, "undecided"),
        ((0.9, 1.0, 1.1), 1.5, "does not hold"),
        ((-0.05, -0.04, -0.03), -0.1, "holds"),
        ((0.1, 1.0, 2.0), 0.0, "undecided"),  # Student's t over seeds reaches below 0; the bootstrap does not
    ],
)
def test_word(means: tuple[float, ...], more_than: float, word: str) -> None:
    assert judge(np.repeat(np.array(means)[:, None], 40, axis=1), more_than).word == word


def test_noise_alone_is_undecided_in_all_but_few_cases() -> None:
    """Two intervals must agree, so that fewer than 5 % of differences of nothing but noise get a verdict."""
    rng = np.random.default_rng(2)
    words = [judge(rng.integers(-1, 2, (3, 60)).astype(float)).word for _ in range(60)]
    assert words.count("undecided") > 56


@pytest.mark.parametrize("values", [np.array([0.0, 1.0, 1.0]), np.array([-1.5, 0.123, 5.9])])
def test_values_survive_packing(values: np.ndarray) -> None:
    packed = Values("ab", values).packed()
    assert packed["mean"] == pytest.approx(values.mean(), abs=1e-3)
    back = Values.unpacked(packed)
    assert back.items == "ab"
    np.testing.assert_allclose(back.values, values, atol=5e-4)


def test_bits_are_small() -> None:
    packed = Values("ab", (np.arange(3000) % 3 == 0).astype(float)).packed()
    assert len(packed["bits"]) <= 500


@pytest.mark.parametrize("value", [math.nan, 33.0])
def test_values_that_do_not_fit_are_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"values from \S+ to \S+: give finite ones below 32\.7"):
        Values("ab", np.array([0.5, value])).packed()


def test_students_quantiles_have_975_of_1000_below_them() -> None:
    """P(|T| > t) with ν degrees of freedom is the regularised incomplete beta function of ν/2, ½ at ν / (ν + t²)."""
    for degrees, quantile in enumerate(STUDENT, start=1):
        outside = betainc(degrees / 2, 0.5, 0, degrees / (degrees + quantile**2), regularized=True)
        assert float(outside) == pytest.approx(0.05, abs=5e-5)


@pytest.mark.parametrize("runs", range(2, 11))
def test_the_interval_of_any_number_of_runs(runs: int) -> None:
    means = [float(n) for n in range(runs)]
    half = STUDENT[runs - 2] * (runs * (runs + 1) / 12) ** 0.5 / runs**0.5  # variance of 0 … n − 1 is n (n + 1) / 12
    middle = (runs - 1) / 2
    assert student_interval(means)[:3] == pytest.approx((middle, middle - half, middle + half))
