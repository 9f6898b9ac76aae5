"""Calibration: hand values, a calibrated model, exchanged sides, edges of bins."""

import numpy as np
import pytest
import torch

from latentreward.core.bootstrap import two_folds
from latentreward.reward import PairCalibration
from latentreward.reward.metrics.calibration import fit_temperature


def error_of(probability: torch.Tensor, label: torch.Tensor, bins: int = 10) -> float:
    metric = PairCalibration(bins)
    metric.update(probability, label)
    return metric.compute().item()


def test_by_hand() -> None:
    # bins [.5, .75) and [.75, 1]: confidences .6 and .7 right and wrong, .9 right, .2 -> .8 wrong
    probability, label = torch.tensor([0.6, 0.7, 0.9, 0.2]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert error_of(probability, label, bins=2) == pytest.approx((abs(1 - 1.3) + abs(1 - 1.7)) / 4, rel=1e-5)


def test_a_calibrated_model_has_no_error() -> None:
    probability = torch.tensor([0.75, 0.75, 0.75, 0.75, 0.5, 0.5])
    label = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.5])
    assert error_of(probability, label) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bins", [1, 3, 5, 10])
def test_exchanging_all_sides_changes_nothing(bins: int) -> None:
    probability = torch.cat([torch.arange(0, 11) / 10, torch.rand(50, generator=torch.Generator().manual_seed(0))])
    label = torch.linspace(0, 1, len(probability))
    assert error_of(1 - probability, 1 - label, bins) == pytest.approx(error_of(probability, label, bins), abs=1e-6)


def test_curve_counts_pairs() -> None:
    metric = PairCalibration(2)
    metric.update(torch.tensor([[0.6, 0.1], [1.0, 0.5]]), torch.tensor([1.0, 0.5]))
    count, confidence, outcome = metric.curve()
    assert count.tolist() == [2, 2]
    assert confidence.tolist() == pytest.approx([0.55, 0.95])
    assert outcome.tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen_and_nan_probabilities_are_nan() -> None:
    assert PairCalibration().compute().isnan()
    assert torch.tensor(error_of(torch.tensor([float("nan"), 0.5]), torch.ones(2))).isnan()


def answers(number: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    gap = rng.normal(size=number)
    return gap, (rng.random(number) < 1 / (1 + np.exp(-gap / temperature))).astype(float)


def log_likelihood(gap: np.ndarray, label: np.ndarray, temperature: float) -> float:
    z = gap / temperature
    return float((-label * np.logaddexp(0, -z) - (1 - label) * np.logaddexp(0, z)).sum())


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_temperature_is_the_likeliest_and_near_the_true_one(temperature) -> None:
    gap, label = answers(20_000, temperature)
    label[:20] = 0.5
    fitted = fit_temperature(gap, label)
    assert fitted == pytest.approx(temperature, rel=0.15)
    best = log_likelihood(gap, label, fitted)
    assert all(log_likelihood(gap, label, fitted * factor) < best for factor in (0.5, 0.95, 1.05, 2))


def test_temperature_follows_the_scale_of_scores_and_leaves_out_what_is_unknown() -> None:
    gap, label = answers(500, 0.5)
    fitted = fit_temperature(gap, label)
    assert fit_temperature(1e6 * gap, label) == pytest.approx(1e6 * fitted)
    assert fit_temperature(-gap, 1 - label) == pytest.approx(fitted)
    unknown = np.concatenate([gap, [np.nan, 1.0]]), np.concatenate([label, [1.0, np.nan]])
    assert fit_temperature(*unknown) == fitted


def test_temperature_of_scores_that_tell_nothing_and_of_scores_that_tell_all() -> None:
    gap, label = answers(500, 0.5)
    for useless in (-gap, np.zeros(500), gap[:0]):
        assert fit_temperature(useless, label[: len(useless)]) == np.inf
    assert 0 < fit_temperature(gap, (gap > 0).astype(float)) < 0.001


def test_folds_keep_groups_together_whatever_the_order() -> None:
    groups = np.array([f"prompt {n % 21}" for n in range(200)])
    halves = two_folds(groups)
    by_group = {group: set(halves[groups == group].tolist()) for group in groups}
    assert all(len(half) == 1 for half in by_group.values())
    assert abs(sum(2 * half.pop() - 1 for half in by_group.values())) == 1
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(two_folds(groups[order]), halves[order])
