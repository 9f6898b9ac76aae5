"""Sub-groups, paired differences, noise levels, calibration and agreement of scored pairs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from latentreward.apps.evaluation.benchmark.base import (
    AVERAGE,
    FOUR_BENCHMARKS,
    PUBLISHED,
    BenchmarkReport,
    published_for,
)
from latentreward.apps.evaluation.benchmark.evaluate import (
    add_averages,
    agreement_result,
    calibration_result,
    cross_fitted_probability,
    level_results,
    paired_difference,
    subgroup_results,
)
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS, judge
from latentreward.apps.evaluation.benchmark.sections import sections
from latentreward.core.bootstrap import Interval
from latentreward.reward import PairCalibration
from tests.apps.evaluation.benchmark.scored import NAN, drawn, scored


def test_subgroups_are_the_protocol_on_their_rows() -> None:
    models = tuple(
        np.random.default_rng(0).choice(["A against B", "A against C", "B against C"], 300, p=[0.5, 0.3, 0.2])
    )
    pairs = drawn(300, columns={"models": models})
    found = subgroup_results(judge("imagereward/macro", pairs))
    assert {item["value"] for item in found} == set(models)
    assert [item["pairs"] for item in found] == sorted((item["pairs"] for item in found), reverse=True)
    assert {item["column"] for item in found} == {"models"}
    for item in found:
        rows = np.array(models) == item["value"]
        groups = [pairs.groups[row] for row in np.flatnonzero(rows)]
        part = scored(pairs.first[rows], pairs.second[rows], pairs.labels[rows], groups)
        alone = judge("imagereward/macro", part).result()
        assert (item["estimate"], item["pairs"]) == (alone["estimate"], alone["pairs"])


def test_paired_difference_counts_what_both_scored() -> None:
    pairs = drawn(300)
    first = pairs.first.copy()
    first[:30] = NAN
    other = replace(drawn(300), scorer="other", first=first, second=pairs.second + 0.5)
    judged = [judge("pairs/strict", item) for item in (pairs, other)]
    found = paired_difference(*judged)
    both = ~np.isnan(judged[1].credit)
    assert found["pairs"] == both.sum()
    assert found["estimate"].value == pytest.approx(judged[0].credit[both].mean() - judged[1].credit[both].mean())
    assert found["estimate"].low < found["estimate"].value < found["estimate"].high
    same = paired_difference(judged[0], judged[0])["estimate"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_levels_are_the_protocol_at_each() -> None:
    pairs = drawn(300)
    noise = np.random.default_rng(0).normal(size=(2, 300))
    levels = []
    for sigma in (0, 0.5, 1):
        first, second = (pairs.first, pairs.second) + 4 * sigma * noise
        levels.append((sigma, 1000 * sigma, replace(pairs, first=first, second=second)))
    found = level_results("hpdv3", levels)
    assert [(item["sigma"], item["timestep"]) for item in found] == [(0, 0), (0.5, 500), (1, 1000)]
    assert found[0]["estimate"] == judge("hpdv3", pairs).result()["estimate"]
    assert found[0]["estimate"].value > found[1]["estimate"].value > found[2]["estimate"].value


def answered(number: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    gap = rng.normal(size=number)
    return gap, (rng.random(number) < 1 / (1 + np.exp(-gap / temperature))).astype(float)


@pytest.mark.slow
def test_calibrated_scores_of_any_scale_have_little_error() -> None:
    gap, labels = answered(2500, 0.7)
    for scale in (1, 50):
        found = calibration_result("hpdv3", scored(scale * gap, 0.0, labels))
        assert found["temperature"] == pytest.approx(0.7 * scale, rel=0.15)
        assert found["error"].value < 0.03
        assert found["error"].low <= found["error"].value <= found["error"].high
        assert sum(count for count, _, _ in found["curve"]) == 2500


def test_gaps_whose_size_tells_nothing_are_not_calibrated() -> None:
    gap, labels = answered(2000, 0.7)
    odd = np.sign(gap) * np.random.default_rng(1).lognormal(0, 2, 2000)
    assert calibration_result("hpdv3", scored(odd, 0.0, labels))["error"].low > 0.05
    useless = calibration_result("hpdv3", scored(gap, 0.0, 1 - labels))
    assert (useless["temperature"], useless["curve"][0][1]) == (np.inf, 0.5)


def test_calibration_is_that_of_the_metric_on_cross_fitted_probabilities() -> None:
    pairs = drawn(300)
    probability = cross_fitted_probability(pairs.first - pairs.second, pairs.labels, np.array(pairs.groups))
    metric = PairCalibration()
    metric.update(torch.from_numpy(probability), torch.from_numpy(pairs.labels))
    assert calibration_result("hpdv3", pairs)["error"].value == pytest.approx(metric.compute().item(), abs=1e-6)
    with_gaps = scored(
        [*pairs.first, NAN, 1], [*pairs.second, 0, 0], [*pairs.labels, 1, NAN], [*pairs.groups, "x", "y"]
    )
    assert calibration_result("hpdv3", with_gaps) == calibration_result("hpdv3", pairs)


def test_a_half_does_not_see_its_own_labels() -> None:
    gap, labels = answered(60, 0.7)
    groups = np.array([f"g{n}" for n in range(60)])
    plain = cross_fitted_probability(gap, labels, groups)
    for row in range(60):
        changed = labels.copy()
        changed[row] = 1 - changed[row]
        assert cross_fitted_probability(gap, changed, groups)[row] == plain[row]


def test_agreement_by_hand_and_by_torchmetrics() -> None:
    pairs = drawn(90)
    other = replace(drawn(90, 1), scorer="other")
    found = agreement_result(pairs, other)
    alike = (pairs.first > pairs.second) == (other.first > other.second)
    assert (found["pairs"], found["pair"].value) == (90, pytest.approx(alike.mean()))
    scores = [torch.tensor(np.concatenate([item.first, item.second])) for item in (pairs, other)]
    for kind, metric in {"spearman": spearman_corrcoef, "pearson": pearson_corrcoef}.items():
        assert found[kind].value == pytest.approx(metric(*scores).item(), abs=1e-6)


def test_an_image_that_recurs_counts_once() -> None:
    """Three images of one prompt in three pairs, and one of another prompt."""
    keys = {"first_images": ("a", "a", "b", "a"), "second_images": ("b", "c", "c", "d")}
    groups = ["p", "p", "p", "q"]
    pairs = scored([1, 1, 2, 9], [2, 4, 4, 7], [1, 1, 1, 1], groups, **keys)
    other = scored([5, 5, 3, 1], [3, 8, 8, 2], [1, 1, 1, 1], groups, **keys)
    expected = np.corrcoef([1, 2, 4, 9, 7], [5, 3, 8, 1, 2])[0, 1]
    assert agreement_result(pairs, other)["pearson"].value == pytest.approx(expected)


def test_published_numbers_belong_to_protocols_and_name_their_source() -> None:
    assert {number["protocol"] for number in PUBLISHED} <= {*PROTOCOLS, AVERAGE}
    least = {"editreward_bench/4": 0.01}  # few groups of four results are ordered right by chance
    assert all(least.get(number["protocol"], 0.1) < number["value"] < 0.9 for number in PUBLISHED)
    assert all(len(number["source"]) > 20 for number in PUBLISHED)
    assert len({(number["protocol"], number["model"], number["source"]) for number in PUBLISHED}) == len(PUBLISHED)
    hpdv3 = {number["model"]: number["value"] for number in published_for(("hpdv3",))}
    assert (hpdv3["DiNa-LRM"], hpdv3["LRM-SDXL"], hpdv3["HPSv2"]) == (0.7504, 0.538, 0.653)


def test_mean_of_four_benchmarks_is_unweighted_and_of_all_four_alone() -> None:
    published = {"imagereward": 0.6034, "hpdv2": 0.8213, "hpdv3": 0.7504, "genai_bench_tiger": 0.6843}  # DiNa-LRM's
    rows = []
    for n, (name, value) in enumerate(published.items(), start=1):
        interval, data = Interval(value, value - 0.01 * n, value + 0.02, 10 * n), f"{name} test"
        counts = {"pairs": n, "groups": n, "equal_scores": 0, "excluded": {}, "details": {}}
        protocol = FOUR_BENCHMARKS[data]
        rows.append({"protocol": protocol, "scorer": "dina", "estimate": interval, **counts, "benchmark": data})
    elsewhere = [{**rows[0], "benchmark": "imagerewarddb test"}, {**rows[3], "benchmark": "genai_bench_tiger test_v1"}]
    three = [{**row, "scorer": "three"} for row in rows[:3]]
    found = BenchmarkReport({"dina": "", "three": ""}, [*rows, *three, *elsewhere])
    add_averages(found)
    (average,) = found.averages
    assert average["scorer"] == "dina"
    spread = 0.01 * 30**0.5 / 4
    assert average["estimate"] == pytest.approx((0.71485, 0.71485 - spread, 0.71485 + 0.01, 10))
    means = {row["model"]: row["value"] for row in found.published}
    assert list(means.values()) == [0.7149, 0.7248, 0.6173, 0.7484, 0.7051, 0.7281, 0.7068, 0.6493, 0.7027]
    assert means["DiNa-LRM"] - means["LRM-SDXL"] == pytest.approx(0.0976)  # the gain that the paper states
    assert any(section.title == "Mean of four benchmarks" for section in sections(found))
    without = BenchmarkReport({"dina": "", "three": ""}, found.protocols[4:])
    add_averages(without)
    assert without.averages == without.published == []


def test_numbers_and_ends_stay_as_they_were() -> None:
    pairs = drawn(400)
    estimate = judge("imagereward/micro", pairs).result()["estimate"]
    expected = (0.710691823899371, 0.659375, 0.7605200058840835)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(expected, rel=1e-12)
