"""Intervals of a difference over seeds and items."""

from collections.abc import Sequence

import numpy as np

from latentreward.metrics.bootstrap import RESAMPLES, Interval, percentile_ends, resample_sums

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t distribution with 1 to 9 degrees of freedom."""


def crossed_interval(differences: np.ndarray) -> Interval:
    """Compute the mean of paired differences and its 95 % interval by resampling runs and items, independently.

    Every run is measured on the same items, so one draw of items serves all runs of a resample (unlike
    :func:`bootstrap_interval`, which draws items anew within each run). ``differences`` are ``(runs, items)``; with one
    run only items are resampled.
    """
    runs, items = differences.shape
    # The number of drawn items is counted, because bundles of items may differ in size.
    sums = resample_sums(np.column_stack([differences.T, np.ones(items)]))
    means = sums[:, :-1] / sums[:, -1:]
    drawn = np.random.default_rng(1).integers(runs, size=(RESAMPLES, runs))
    means = np.take_along_axis(means, drawn, axis=1).mean(axis=1)
    return Interval(float(differences.mean()), *percentile_ends(means), items)


def student_interval(means: Sequence[float]) -> Interval:
    """Compute the mean over runs and its 95 % interval by Student's t, which includes the variation between trainings.

    There is one mean per run; the ends are NaN with one run.

    Raises:
        ValueError: If there are more than 10 runs.
    """
    if len(means) > len(STUDENT) + 1:
        raise ValueError(f"{len(means)} runs: quantiles are known for up to {len(STUDENT) + 1}")
    value = float(np.mean(means))
    if len(means) < 2:
        return Interval(value, np.nan, np.nan, len(means))
    spread = STUDENT[len(means) - 2] * float(np.std(means, ddof=1)) / len(means) ** 0.5
    return Interval(value, value - spread, value + spread, len(means))
