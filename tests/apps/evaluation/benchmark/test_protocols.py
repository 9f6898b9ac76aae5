"""Protocols by hand: what each makes of perfect, constant and one-sided scores, of ties, and of missing parts."""

import math
from dataclasses import replace

import numpy as np
import pytest

from latentreward.apps.evaluation.benchmark.base import BenchmarkPairs
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS, judge
from tests.apps.evaluation.benchmark.scored import LABELS, NAN, drawn, scored

PERFECT = np.array(LABELS) - 0.5
STRICT = {"perfect": 1, "constant": 0, "first": 2 / 4, "second": 2 / 4}
BY_PROMPT = {"perfect": 1, "constant": 0, "first": 1 / 3, "second": 2 / 3}
SOFT = {"perfect": 4 / 5, "constant": 0, "first": 2.5 / 5, "second": 2.5 / 5}
KEYS = [key for key in PROTOCOLS if not key.removeprefix("editreward_bench/").isdigit()]  # others need groups of K
EXPECTED = {
    **dict.fromkeys(KEYS, STRICT),
    "imagereward/macro": BY_PROMPT,
    "hpdv2/macro": {"perfect": 1, "constant": (2.5 / 4 + 1 / 2) / 2, "first": 3 / 8, "second": (2 / 4 + 1) / 2},
    "pickapic/pickscore": {"perfect": 1, "constant": 3 / 5, "first": 3 / 5, "second": 3 / 5},
    "editreward_bench/groups": {"perfect": 1, "constant": 0, "first": 0, "second": 1 / 2},
    "pickapic/lrm": SOFT,
    "pairs/soft": SOFT,
}
SCORES = {"perfect": PERFECT, "constant": 0.0, "first": 1.0, "second": -1.0}


def value(key: str, pairs: BenchmarkPairs, fitting: BenchmarkPairs | None = None) -> float:
    fitting = fitting or (pairs if key == "pickapic/pickscore" else None)
    return judge(key, pairs, fitting).result()["estimate"].value


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", SCORES)
def test_by_hand(key, kind) -> None:
    pairs = scored(SCORES[kind])
    assert value(key, pairs) == pytest.approx(EXPECTED[key][kind])
    assert value(key, replace(pairs, first=100 * pairs.first, temperature=100.0)) == pytest.approx(EXPECTED[key][kind])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", ["constant", "first", "second"])
def test_neither_equal_scores_nor_one_side_win(key, kind) -> None:
    pairs = drawn(300)
    assert value(key, replace(pairs, first=pairs.first * 0 + SCORES[kind], second=pairs.second * 0)) < 0.7


@pytest.mark.parametrize("key", KEYS)
def test_exchanging_sides_changes_nothing(key) -> None:
    pairs = drawn(300)
    other = scored(pairs.second, pairs.first, 1 - pairs.labels, pairs.groups)
    assert value(key, other) == pytest.approx(value(key, pairs))


@pytest.mark.parametrize("key", KEYS)
def test_what_does_not_count_is_counted_by_reason(key) -> None:
    first = [1, NAN, NAN, 1, 1, 1]
    labels = [1, 1, 0.5, NAN, 0.5, 0]
    columns = {"problem": (None, "missing file", None, None, None, None)}
    pairs = scored(first, 0.0, labels, columns=columns)
    result = judge(key, pairs, pairs).result()
    assert (result["excluded"].pop("missing file"), result["excluded"].pop("no score")) == (1, 1)
    rest = {"no label": 1, "tie": 1}
    if key in ("hpdv2/macro", "pickapic/lrm", "pairs/soft", "editreward_bench/groups"):
        rest = {"no label": 1}
    elif key == "pickapic/pickscore":
        rest = {}
    assert result["excluded"] == rest
    assert (result["pairs"], result["equal_scores"]) == (4 - sum(rest.values()), 0)


@pytest.mark.parametrize("key", KEYS)
def test_nothing_to_count_has_no_value(key) -> None:
    pairs = scored([NAN, NAN], 0.0, [1, 0])
    result = judge(key, pairs, pairs).result()
    assert (result["pairs"], result["groups"]) == (0, 0)
    assert np.isnan([result["estimate"].value, result["estimate"].low, result["estimate"].high]).all()


def test_hpdv2_tells_what_mps_would_say_of_equal_scores() -> None:
    judgement = judge("hpdv2/macro", scored(0.0))
    assert judgement.details == {"equal_scores_agree": 1.0}
    judgement = judge("hpdv2/macro", scored([0, -1, 0, 0, 1]))
    assert judgement.details == {"equal_scores_agree": pytest.approx((3 / 4 + 0) / 2)}


def plain_pickscore(pairs: BenchmarkPairs, fitting: BenchmarkPairs) -> tuple[float, float]:
    """Threshold and credit by loops over softmax, as the formats file describes PickScore's code."""

    def credit(item: BenchmarkPairs, threshold: float) -> float:
        total = 0.0
        for first, second, label in zip(item.first, item.second, item.labels, strict=True):
            a, b = (math.exp(score / pairs.temperature) for score in (first, second))
            people = "tie" if label == 0.5 else "0" if label == 1 else "1"
            answer = "tie" if abs(a - b) / (a + b) <= threshold else "0" if a > b else "1"
            total += 1 if answer == people else 0.5 if "tie" in (answer, people) else 0
        return total / len(item.labels)

    curve = [credit(fitting, n / 10) for n in range(11)]
    return curve.index(max(curve)) / 10, credit(pairs, curve.index(max(curve)) / 10)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_pickscore_equals_loops(temperature, seed) -> None:
    pairs, fitting = drawn(120, seed, temperature=temperature), drawn(90, seed + 10)
    judgement = judge("pickapic/pickscore", pairs, fitting)
    threshold, credit = plain_pickscore(pairs, fitting)
    assert judgement.details["threshold"] == threshold
    assert judgement.credit.mean() == pytest.approx(credit)


def test_pickscore_fits_the_temperature_on_the_other_split_if_asked() -> None:
    pairs, fitting = drawn(120, temperature=None), drawn(600, 1)
    judgement = judge("pickapic/pickscore", pairs, fitting)
    scaled = replace(pairs, first=1000 * pairs.first, second=1000 * pairs.second)
    other = replace(fitting, first=1000 * fitting.first, second=1000 * fitting.second)
    scaled_judgement = judge("pickapic/pickscore", scaled, other)
    assert scaled_judgement.details["temperature"] == pytest.approx(1000 * judgement.details["temperature"])
    np.testing.assert_array_equal(scaled_judgement.credit, judgement.credit)


def test_pickscore_takes_published_labels_where_there_are_some() -> None:
    labels = {"label_0": ("1.0", "0.5", None, "0.0")}
    pairs = scored([1, 0, -1, -1], 0.0, [1, NAN, NAN, 0], columns=labels)
    np.testing.assert_array_equal(judge("pickapic/pickscore", pairs, pairs).credit, np.ones(4))


def test_interval_of_a_protocol_resamples_prompts() -> None:
    pairs = drawn(600)
    wide = replace(pairs, groups=tuple(f"{n // 60}" for n in range(600)))
    narrow = replace(pairs, groups=tuple(map(str, range(600))))
    estimates = [judge("pairs/strict", item).result()["estimate"] for item in (narrow, wide)]
    assert estimates[0].value == estimates[1].value
    half = 1.96 * np.sqrt(estimates[0].value * (1 - estimates[0].value) / 480)
    assert estimates[0].high - estimates[0].value == pytest.approx(half, rel=0.15)


def test_groups_of_edits_are_right_as_a_whole() -> None:
    """K = 2 with a threshold that is tuned on them, K = 3 by order without labelled ties."""
    groups = ["two", "tied", "other", *["three"] * 3, *["more"] * 3]
    labels = [1, 0.5, 0, 1, 1, 0.5, 1, 1, 1]
    gaps = [3, 0.4, -2, 2, 1, 9, 2, 1, -1]
    judged = judge("editreward_bench/groups", scored(gaps, labels=labels, groups=groups))
    assert judged.details["accuracy"] == {"K = 2": 1.0, "K = 3": 0.5} and judged.details["groups"] == {
        "K = 2": 3,
        "K = 3": 2,
    }
    assert 0.4 <= judged.details["threshold"] < 2 and judged.value == 4 / 5 and judged.excluded == {"tie": 1}
    by_number = [judge(f"editreward_bench/{count}", scored(gaps, labels=labels, groups=groups)) for count in (2, 3)]
    assert [one.value for one in by_number] == [1.0, 0.5]
    assert by_number[0].excluded == {"other number of results": 5, "tie": 1}
    always = judge("editreward_bench/groups", scored(0, labels=labels, groups=groups))
    assert always.value == 1 / 5  # ties alone are right
