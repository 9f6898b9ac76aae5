"""Means, win rates and differences worked out by hand; intervals resample prompts."""

from pathlib import Path

import numpy as np
import pytest

from latentreward.apps.evaluation.policy.statistics import ScoredPictures, compare, policy_scores
from latentreward.core.bootstrap import wilson_ends
from latentreward.core.reports.tables import Row
from latentreward.reward.scorers.tools import JudgedPicture

MEAN = {"score": "mean"}


def scored(
    values: np.ndarray, groups: tuple[str, ...] | None = None, policy: str = "a", prompts: list[str] | None = None
) -> ScoredPictures:
    """``values`` is (prompts, pictures of each)."""
    pictures = [
        JudgedPicture(place, image, "", Path(), (prompts or list(map(str, range(len(values)))))[place], group)
        for place, group in enumerate(groups or ("",) * len(values))
        for image in range(values.shape[1])
    ]
    return ScoredPictures(policy, tuple(pictures), {"score": np.asarray(values, np.float64).ravel()})


def only(found: list[Row]) -> Row:
    (score,) = found
    return score


def test_a_mean_is_over_all_pictures_and_its_interval_that_of_the_prompts_means() -> None:
    values = np.random.default_rng(0).normal(size=(200, 1)).repeat(4, axis=1)
    several, one = (only(policy_scores(scored(rows), MEAN)) for rows in (values, values[:, :1]))
    assert several["mean"].value == pytest.approx(values.mean())
    assert (several["mean"].low, several["mean"].high) == pytest.approx((one["mean"].low, one["mean"].high))
    half = 1.96 * values[:, 0].std() / 200**0.5
    assert several["mean"].high - several["mean"].low == pytest.approx(2 * half, rel=0.1)
    assert (several["pictures"], several["prompts"]) == (800, 200)
    assert (several["groups"], several["mean_of_groups"]) == ([], None)


def test_a_win_rate_without_spread_between_prompts_has_wilsons_interval() -> None:
    better, worse = scored(np.ones((3, 2))), scored(np.zeros((3, 2)), policy="b")
    (result,) = compare(worse, better, MEAN)
    assert result["win_rate"] == pytest.approx((0.0, 0.0, 0.5615, 3), abs=1e-4)  # 1.96² / (3 + 1.96²)


def test_wins_ties_and_losses_count_one_a_half_and_nothing() -> None:
    first = scored(np.array([[1.0, 2.0], [3.0, 0.0]]))
    second = scored(np.array([[0.0, 2.0], [4.0, 0.0]]), policy="b")
    (result,) = compare(first, second, MEAN)
    assert (result["wins"], result["ties"], result["losses"]) == (1, 2, 1)
    assert result["win_rate"].value == (1 + 0.5 + 0 + 0.5) / 4
    assert result["difference"].value == (1 + 0 - 1 + 0) / 4
    (turned,) = compare(second, first, MEAN)
    assert turned["win_rate"].value == 1 - result["win_rate"].value
    assert (turned["win_rate"].low, turned["win_rate"].high) == pytest.approx(
        (1 - result["win_rate"].high, 1 - result["win_rate"].low)
    )
    assert turned["difference"].value == -result["difference"].value


def test_a_policy_against_itself_is_at_one_half_and_a_better_one_at_one() -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    (same,) = compare(scored(values), scored(values, policy="b"), MEAN)
    low, high = wilson_ends(0.5, 30)
    assert same["win_rate"] == pytest.approx((0.5, low, high, 30))
    (better,) = compare(scored(values + 0.1), scored(values, policy="b"), MEAN)
    assert better["win_rate"] == pytest.approx((1.0, 30 / (30 + 1.96**2), 1.0, 30), abs=1e-5)
    assert (better["difference"].value, better["difference"].low, better["difference"].high) == pytest.approx(
        (0.1, 0.1, 0.1)
    )


def test_the_mean_of_groups_weighs_groups_alike() -> None:
    values, groups = np.array([[1.0], [1.0], [1.0], [0.0]]), ("counting", "counting", "counting", "colors")
    result = only(policy_scores(scored(values, groups), {"score": "mean_of_groups"}))
    assert result["mean"].value == 0.75
    assert result["mean_of_groups"].value == 0.5
    assert 0 <= result["mean_of_groups"].low <= 0.5 <= result["mean_of_groups"].high <= 1
    assert [(group["group"], group["prompts"], group["mean"].value) for group in result["groups"]] == [
        ("counting", 3, 1.0),
        ("colors", 1, 0.0),
    ]


def test_the_difference_of_means_of_groups_weighs_groups_alike() -> None:
    groups = ("counting", "counting", "counting", "colors")
    better = scored(np.array([[1.0], [1.0], [1.0], [0.0]]), groups)
    worse = scored(np.array([[0.0], [1.0], [1.0], [0.0]]), groups, policy="b")
    whole, counting, _ = compare(better, worse, {"score": "mean_of_groups"})
    assert whole["difference"].value == pytest.approx(1 / 6)  # of the means 1/2 and 1/3 shown beside it
    assert whole["difference"].low == 0.0
    assert counting["difference"].value == pytest.approx(1 / 3)
    assert compare(better, worse, MEAN)[0]["difference"].value == 1 / 4


def test_parts_of_a_group_are_successive_prompts() -> None:
    values = np.arange(800.0).reshape(800, 1)
    (group,) = only(policy_scores(scored(values, ("anime",) * 800), MEAN, parts=10))["groups"]
    assert group["mean"].value == values.mean()
    assert group["parts_sd"] == pytest.approx(
        np.std([values[start : start + 80].mean() for start in range(0, 800, 80)])
    )
