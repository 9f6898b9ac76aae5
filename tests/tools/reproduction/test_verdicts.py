"""Intervals of a difference over seeds and items, what they say of a claim, and how often they err."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from mpmath import betainc

from latentreward.core.errors import InputError
from tests.tools.reproduction.test_page import result
from tests.tools.reproduction.test_rows import TOY
from tools.reproduction.measuring import Values
from tools.reproduction.results import sample_of
from tools.reproduction.rows import LEAST_SEEDS, MOST_SEEDS, read_row
from tools.reproduction.verdicts import (
    FIRST_LEVEL,
    LEVELS,
    RATE,
    SHRINKS,
    Sample,
    critical,
    crossed_means,
    judge,
    largest_discovery,
    student_interval,
    tail,
    with_discoveries,
)

Z = NormalDist().inv_cdf(0.975)


def sample(*means: float, whole: bool = True) -> Sample:
    """A sample whose items are equal within each repetition."""
    return Sample(np.repeat(np.array(means)[:, None], 40, axis=1), whole)


@pytest.mark.parametrize("level", [0.05, 0.02, *LEVELS[::3]])
@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 11])
def test_students_distribution(degrees: int, level: float) -> None:
    """P(|T| > t) with ν degrees of freedom is the regularised incomplete beta function of ν/2, ½ at ν / (ν + t²)."""
    quantile = critical(level, degrees)
    outside = betainc(degrees / 2, 0.5, 0, degrees / (degrees + quantile**2), regularized=True)
    assert float(outside) == pytest.approx(level, rel=1e-9)
    assert tail(-quantile, degrees) == pytest.approx(level, rel=1e-9)


@pytest.mark.parametrize("runs", range(2, 13))
def test_the_interval_of_any_number_of_runs(runs: int) -> None:
    means, level = [float(n) for n in range(runs)], 0.05
    half = critical(level, runs - 1) * (runs * (runs + 1) / 12) ** 0.5 / runs**0.5  # of 0 … n − 1: n (n + 1) / 12
    middle = (runs - 1) / 2
    assert student_interval(means, level)[:3] == pytest.approx((middle, middle - half, middle + half))
    assert math.isnan(student_interval([1.0], level).low)


def half_crossed(differences: np.ndarray) -> float:
    """Half of the 95 % interval of resampled repetitions and items."""
    low, high = np.quantile(crossed_means(differences), (0.025, 0.975))
    return float(high - low) / 2


def test_crossed_interval_of_items_alone_is_that_of_one_run() -> None:
    """All runs share the items, so more runs that agree make the interval no narrower."""
    items = np.random.default_rng(0).normal(0.5, 2.0, 2000)
    assert half_crossed(np.stack([items] * 5)) == pytest.approx(Z * items.std() / math.sqrt(len(items)), rel=0.05)


def test_crossed_interval_of_many_items() -> None:
    """More than 10 000 items are resampled in bundles, here of 2 and of 3 items."""
    items = np.random.default_rng(0).normal(5.0, 1.0, (1, 10_001))
    assert half_crossed(items) == pytest.approx(Z * items.std() / math.sqrt(items.size), rel=0.05)


def test_crossed_interval_of_runs_alone_is_that_of_their_means() -> None:
    """Of two runs both are drawn once half of the time, and one of them twice a quarter of the time each."""
    found = crossed_means(np.array([[0.0] * 50, [1.0] * 50]))
    assert [np.mean(found == value) for value in (0.0, 0.5, 1.0)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_crossed_interval_adds_both_variances() -> None:
    rng = np.random.default_rng(1)
    runs, items = rng.normal(0, 1, 10), rng.normal(0, 30, 1000)
    spread = Z * math.sqrt(runs.var() / 10 + items.var() / 1000)
    assert half_crossed(runs[:, None] + items) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    ("means", "word", "slight"),
    [
        ((0.035, 0.05, 0.065), "no difference", True),  # Student's t: .042 beyond .05 for one side, .060 for two
        ((0.98, 1.0, 1.02), "holds", False),
        ((-0.98, -1.0, -1.02), "does not hold", False),
        ((0.010, 0.0101, 0.0102), "holds", True),
        ((-0.001, 0.0, 0.001), "no difference", True),
        ((0.1, 1.0, 2.0), "open", False),  # Student's t over seeds reaches below 0; the bootstrap does not
        ((1.0, 1.0, 1.0), "open", False),  # nothing is known of the spread
        ((0.0, 0.0, 0.0), "open", False),
    ],
)
def test_word(means: tuple[float, ...], word: str, slight: bool) -> None:
    found = judge(sample(*means, whole=False), 0.1)
    assert (found.word, found.slight) == (word, slight)
    assert (min(found.p_difference, found.p_margin) < RATE) == (word != "open")


def test_what_should_be_exceeded_is_shown_in_the_difference() -> None:
    found = judge(sample(0.04, 0.05, 0.06, whole=False), 0.1, more_than=0.76)
    assert found.difference.value == found.over_seeds.value == pytest.approx(0.81)
    assert found.over_seeds.low == pytest.approx(0.81 - critical(FIRST_LEVEL, 2) * 0.01 / 3**0.5)


def test_items_keep_a_claim_open_that_seeds_would_decide() -> None:
    items = np.random.default_rng(0).normal(0, 8, 100)
    items -= items.mean()
    found = judge(Sample(np.array([0.99, 1.0, 1.01])[:, None] + items, whole=False), 0.1)
    assert found.word == "open"
    assert found.over_seeds.low > 0 > found.difference.low
    assert found.needed is None


def test_seeds_that_would_decide_are_counted() -> None:
    """Seeds that share their pairs count as one repetition, so one more is needed than of whole repetitions."""
    values = (0.2, 0.5, 0.8, 0.4, 0.6)
    found, needed = judge(sample(*values), 0.01), sample(*values).needed(0.01)
    assert needed == found.needed
    assert needed is not None
    number, spread = 5 + needed, float(np.std(values, ddof=1))
    halves = [critical(LEVELS[n - LEAST_SEEDS], n - 1) * spread / n**0.5 for n in (number - 1, number)]
    assert halves[0] > 0.5 > halves[1]
    assert sample(*values, whole=False).needed(0.01) == number - 1


def looks(number: int, seed: int = 0, first: float = 1.0) -> np.ndarray:
    """Student's t after 3, 4, … repetitions of Gaussian claims without effect, the first with another deviation."""
    values = np.random.default_rng(seed).normal(size=(number, MOST_SEEDS))
    values[:, 0] *= first
    counts = np.arange(1, MOST_SEEDS + 1)
    means = np.cumsum(values, axis=1) / counts
    variances = (np.cumsum(values**2, axis=1) - counts * means**2)[:, LEAST_SEEDS - 1 :] / (counts - 1)[2:]
    return means[:, LEAST_SEEDS - 1 :] / np.sqrt(variances / counts[2:])


CRITICAL = [critical(level, number - 1) for number, level in enumerate(LEVELS, LEAST_SEEDS)]


@pytest.mark.parametrize("first", [1.0, 0.58, 0.0], ids=["equal", "of three seeds", "certain"])
def test_looks_at_whole_repetitions_err_in_3_percent(first: float) -> None:
    """All intervals cover the truth together, also if the first repetition is the mean of several seeds."""
    assert len(CRITICAL) == MOST_SEEDS - LEAST_SEEDS + 1
    wrong = (abs(looks(100_000, first=first)) > CRITICAL).any(axis=1).mean()
    assert wrong < 0.03 + 3 * (0.03 / 100_000) ** 0.5
    assert wrong > (0.027 if first == 1.0 else 0.0)


def test_p_values_hold_at_every_look() -> None:
    """At any of all looks, whole repetitions and those that share their pairs, p is below x in at most a share x.

    The same is true of a test of one side, and of repetitions without a look at seeds that share their pairs.
    """
    found = looks(200_000)
    both, one, alone = (np.full(len(found), np.inf) for _ in range(3))
    for place, level in enumerate(LEVELS):
        grid = np.geomspace(1e-8, 1, 400)
        quantiles = [critical(p, place + LEAST_SEEDS - 1) for p in grid]
        p = np.exp(np.interp(abs(found[:, place]), quantiles[::-1], np.log(grid)[::-1]))
        both = np.minimum(both, p / level)
        one = np.minimum(one, np.where(found[:, place] > 0, p / 2, 1 - p / 2) / level)
        alone = np.minimum(alone, p / (level if place else FIRST_LEVEL))
    for ratio in (1.0, 0.7, 0.3, 0.1, 0.03):
        bound = RATE * ratio**SHRINKS
        most = bound + 3 * (bound / len(found)) ** 0.5
        assert np.mean(both <= ratio) + FIRST_LEVEL * ratio < most
        assert np.mean(one <= ratio) + FIRST_LEVEL * ratio < most
        assert np.mean(alone <= ratio) < most


def test_the_discoveries_of_benjamini_and_hochberg() -> None:
    """The example of their paper of 1995, section 3.2: four of fifteen, where Bonferroni keeps three."""
    ps = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528]
    ps += [0.7590, 1.0]
    assert largest_discovery(ps[::-1], len(ps)) == 0.0095
    assert largest_discovery([0.04, 0.06], 2) == 0.0
    assert largest_discovery([], 0) == 0.0


def test_a_verdict_that_chance_explains_is_marked() -> None:
    strong, weak = judge(sample(0.99, 1.0, 1.01, whole=False), 0.1), judge(sample(0.9, 1.0, 1.2, whole=False), 0.1)
    nothing = [judge(sample(-0.9, 0.0, 1.2, whole=False), 0.1)] * 20
    assert (strong.word, weak.word, nothing[0].word) == ("holds", "holds", "open")
    assert [one.survives for one in with_discoveries([weak, strong])] == [True, True]
    assert [one.survives for one in with_discoveries([weak, strong, *nothing])][:2] == [False, True]


def test_at_most_a_share_of_discoveries_is_false() -> None:
    """Of 40 claims, 30 have no effect and 10 one of four standard errors."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(400):
        z = rng.normal(size=40) + 4.0 * (np.arange(40) >= 30)
        ps = [math.erfc(abs(one) / 2**0.5) for one in z]
        found = np.array(ps) <= largest_discovery(ps, 40)
        shares.append(found[:30].sum() / max(1, found.sum()))
    assert np.mean(shares) < 0.05


def test_seeds_with_the_same_pairs_are_one_repetition_beside_whole_ones() -> None:
    row = read_row("toy", TOY)
    of = {seed: result(row, seed, {"one": 0.5 + seed / 100, "other": 0.5}) for seed in (0, 1, 2, 10, 11, 12)}

    def means(*seeds: int) -> tuple[list[float], bool, float] | None:
        found = sample_of(row.claims[0], {seed: of[seed] for seed in seeds}, row)
        return found and (found.means.round(3).tolist(), found.whole, found.level)

    assert means(0, 1) is None
    assert means(10, 11) is None
    assert means(0, 1, 2) == means(0, 1, 2, 10) == ([0.0, 0.01, 0.02], False, FIRST_LEVEL)
    assert means(0, 1, 2, 10, 11) == ([0.01, 0.1, 0.11], True, LEVELS[0])
    assert means(10, 11, 12) == ([0.1, 0.11, 0.12], True, FIRST_LEVEL)


@pytest.mark.parametrize("values", [np.array([0.0, 1.0, 1.0]), np.array([-1.5, 0.123, 5.9])])
def test_values_survive_packing(values: np.ndarray) -> None:
    packed = Values("ab", values).packed()
    assert packed["mean"] == pytest.approx(values.mean(), abs=1e-3)
    back = Values.unpacked(packed)
    assert back.items == "ab"
    np.testing.assert_allclose(back.values, values, atol=5e-4)


def test_no_values_are_refused() -> None:
    """Their mean is NaN, with which no command could read the result again."""
    with pytest.raises(InputError, match="no item has a value"):
        Values("ab", np.array([])).packed()


@pytest.mark.parametrize("value", [math.nan, 33.0])
def test_values_that_do_not_fit_are_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"values from \S+ to \S+: give finite ones below 32\.7"):
        Values("ab", np.array([0.5, value])).packed()
