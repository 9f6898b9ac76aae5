"""PickScore's protocol on Pick-a-Pic: answers left, right or tie, with a tie threshold fitted on another split."""

from typing import Any

import numpy as np

from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.metrics.calibration import fit_temperature

THRESHOLDS = np.arange(11) / 10
FIRST, TIE, SECOND = 1, 0, -1


def pickscore_credit(pairs: BenchmarkPairs, fitting: BenchmarkPairs) -> tuple[np.ndarray, dict[str, Any]]:
    r"""Compute the credit of every pair by the evaluation of PickScore's released code (arXiv:2305.01569).

    With :math:`p = \mathrm{softmax}(s / T)` of a pair's two scores, the answer is a tie where
    :math:`|p_0 - p_1| \le \theta`, else the image with the higher score. An answer gets credit 1 if it equals the
    people's answer, ½ if exactly one of the two answers is a tie, else 0. The threshold θ is the first of 0, 0.1, … 1
    with the highest mean credit on the fitting split. All rows count, as in the released code: ``label_0`` = ½ means a
    tie, 1 the first image, and any other value, null included, the second image.

    Args:
        pairs: Scored pairs of the split that is evaluated. ``columns["label_0"]`` holds the published labels; without
            that column ``labels`` are used. ``temperature`` is T: 1 for scores that are logits, such as PickScore's;
            None fits T on the fitting split.
        fitting: Scored pairs of the fitting split.

    Returns:
        ``(N,)`` credit, 0 for a pair without scores, and a dict of details: ``threshold``, ``temperature``,
        ``credit_by_threshold`` (on the fitting split) and ``credit_without_threshold`` (on the evaluated split).
    """
    fitted = ~np.isnan(fitting.gap)
    temperature = pairs.temperature
    if temperature is None:
        temperature = fit_temperature(fitting.gap[fitted], fitting.labels[fitted])
    curve = (
        [float(credit_at(fitting, temperature, theta)[fitted].mean()) for theta in THRESHOLDS] if fitted.any() else []
    )
    threshold = float(THRESHOLDS[int(np.argmax(curve))]) if curve else 0.0
    scored = ~np.isnan(pairs.gap)
    plain = credit_at(pairs, temperature, 0.0)[scored]
    details = {
        "threshold": threshold,
        "temperature": temperature,
        "credit_by_threshold": curve,
        "credit_without_threshold": float(plain.mean()) if len(plain) else float("nan"),
    }
    return credit_at(pairs, temperature, threshold), details


def credit_at(pairs: BenchmarkPairs, temperature: float, threshold: float) -> np.ndarray:
    """Return the ``(N,)`` credit with a given temperature and threshold."""
    with np.errstate(invalid="ignore"):
        lead = np.tanh(pairs.gap / (2 * temperature))  # p0 - p1
        answer = np.where(np.abs(lead) <= threshold, TIE, np.sign(lead))
    published = pairs.columns.get("label_0")
    labels = pairs.labels if published is None else np.array([np.nan if x is None else float(x) for x in published])
    people = np.where(labels == 0.5, TIE, np.where(labels == 1, FIRST, SECOND))
    return np.where(answer == people, 1.0, np.where((answer == TIE) | (people == TIE), 0.5, 0.0))
