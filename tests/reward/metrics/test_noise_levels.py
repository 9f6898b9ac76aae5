"""Metrics by noise level: bands, their ends, empty bands, reset."""

import pytest
import torch

from latentreward.reward import ByNoiseLevel, PairCalibration, PairwiseAccuracy

SIGMAS = torch.tensor([0.0, 0.29, 0.3, 0.7, 1.0])
CHOSEN = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bands_are_closed_below_and_the_last_one_above() -> None:
    metric = ByNoiseLevel(PairwiseAccuracy(), edges=(0.0, 0.3, 0.7, 1.0))
    metric.update(SIGMAS, CHOSEN, torch.zeros(5), torch.ones(5))
    assert metric.compute() == {"sigma_0_0.3": 0.5, "sigma_0.3_0.7": 1.0, "sigma_0.7_1": 0.5}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_empty_band_is_nan_and_levels_outside_are_left_out() -> None:
    metric = ByNoiseLevel(PairwiseAccuracy(), edges=(0.4, 0.5, 0.8))
    values = metric(SIGMAS, CHOSEN, torch.zeros(5), torch.ones(5))
    assert values["sigma_0.4_0.5"].isnan()
    assert values["sigma_0.5_0.8"] == 0
    metric.reset()
    assert metric.compute()["sigma_0.5_0.8"].isnan()


def test_takes_any_metric() -> None:
    metric = ByNoiseLevel(PairCalibration(bins=2), edges=(0.0, 1.0))
    metric.update(SIGMAS, torch.full((5,), 0.5), torch.full((5,), 0.5))
    assert metric.compute()["sigma_0_1"] == 0
