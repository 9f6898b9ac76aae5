"""Calibration of a scorer's win probabilities σ(gap / temperature), the temperature fitted on other prompts."""

import numpy as np
import torch

from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.metrics.bootstrap import clustered_interval, group_sums
from latentreward.metrics.calibration import PairCalibration, bin_by_confidence, fit_temperature, two_folds
from latentreward.reports.tables import Row

BINS = 10


def calibration_result(key: str, pairs: BenchmarkPairs) -> Row:
    """Compute the expected calibration error over all pairs with a label and two scores, ties included.

    The prompt groups are cut into two halves. The temperature for one half is fitted on the other half by maximum
    likelihood, so the error is measured on unseen prompts. Bins and error are those of
    :class:`~latentreward.metrics.calibration.PairCalibration`. The interval resamples prompt groups and does not refit
    the temperatures; it is centred on the error, because resampling inflates the error. With finitely many pairs the
    error is positive even for a calibrated scorer.
    """
    known = ~(np.isnan(pairs.labels) | np.isnan(pairs.first) | np.isnan(pairs.second))
    gap, label = pairs.gap[known], pairs.labels[known]
    groups = pairs.group_codes[known]
    probability = torch.from_numpy(cross_fitted_probability(gap, label, groups))
    metric = PairCalibration(BINS)
    metric.update(probability, torch.from_numpy(label))
    index, confidence, outcome = bin_by_confidence(probability, torch.from_numpy(label), BINS)
    columns = [np.where(index.numpy() == b, (outcome - confidence).double().numpy(), 0) for b in range(BINS)]
    sums = group_sums(groups, np.ones(len(gap)), *columns)
    error = clustered_interval(sums, lambda sums: np.abs(sums[..., 1:]).sum(-1) / sums[..., 0], centred=True)
    curve = zip(*(values.tolist() for values in metric.curve()), strict=True)
    return {
        "protocol": key,
        "scorer": pairs.scorer,
        "temperature": fit_temperature(gap, label),
        "error": error._replace(low=max(error.low, 0.0)),
        "curve": [(int(count), mean, share) for count, mean, share in curve if count],
        "benchmark": pairs.benchmark,
    }


def cross_fitted_probability(gap: np.ndarray, label: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the ``(N,)`` probability that image a wins; each half of the groups uses the other half's temperature."""
    second_half, probability = two_folds(groups), np.full(len(gap), 0.5)
    for half in (False, True):
        rows = second_half == half
        temperature = fit_temperature(gap[~rows], label[~rows])
        probability[rows] = 0.5 + 0.5 * np.tanh(gap[rows] / (2 * temperature))
    return probability
