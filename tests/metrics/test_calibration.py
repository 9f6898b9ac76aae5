"""Calibration: hand values, a calibrated model, exchanged sides, edges of bins."""

import pytest
import torch

from latentreward.errors import InputError
from latentreward.metrics import PairCalibration


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


def test_certain_and_wrong_is_the_worst() -> None:
    assert error_of(torch.ones(3), torch.zeros(3)) == 1


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


def test_no_bins_are_refused() -> None:
    with pytest.raises(InputError, match="bins = 0"):
        PairCalibration(0)
