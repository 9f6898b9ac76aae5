"""PickScore's protocol of Pick-a-Pic: left, right or tie, with a threshold fitted on another split."""

from typing import Any

import numpy as np

from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.metrics.calibration import fit_temperature

THRESHOLDS = np.arange(11) / 10
FIRST, TIE, SECOND = 1, 0, -1


def pickscore_credit(pairs: BenchmarkPairs, fitting: BenchmarkPairs) -> tuple[np.ndarray, dict[str, Any]]:
    r"""Credit of every pair by the evaluation of PickScore's released code (arXiv:2305.01569).

    With :math:`p = \mathrm{softmax}(s / T)` of a pair's two scores, the answer is a tie where
    :math:`|p_0 - p_1| \le \theta`, else the image of the higher score. It gets 1 if people say the same, ½ if exactly
    one of both is a tie, else 0. The threshold θ is the first of 0, 0.1, … 1 with the highest mean credit on the
    fitting split. All rows count: ``label_0`` = ½ is a tie, 1 the first image, and anything else, null included, the
    second, as published.

    Args:
        pairs: Scores of the split that counts; ``columns["label_0"]`` are the labels as published, where labels are
            null. ``temperature`` is T: 1 for scores that are logits, as PickScore's; None fits it on the other split.
        fitting: Scores of the other split.

    Returns:
        ``(N,)`` credit, 0 for a pair without scores, and details: ``threshold``, ``temperature``,
        ``credit_by_threshold`` on the fitting split, ``credit_without_threshold`` on this one.
    """
    fitted = ~np.isnan(_gap(fitting))
    temperature = pairs.temperature
    if temperature is None:
        temperature = fit_temperature(_gap(fitting)[fitted], fitting.labels[fitted])
    curve = (
        [float(credit_at(fitting, temperature, theta)[fitted].mean()) for theta in THRESHOLDS] if fitted.any() else []
    )
    threshold = float(THRESHOLDS[int(np.argmax(curve))]) if curve else 0.0
    scored = ~np.isnan(_gap(pairs))
    plain = credit_at(pairs, temperature, 0.0)[scored]
    details = {
        "threshold": threshold,
        "temperature": temperature,
        "credit_by_threshold": curve,
        "credit_without_threshold": float(plain.mean()) if len(plain) else float("nan"),
    }
    return credit_at(pairs, temperature, threshold), details


def credit_at(pairs: BenchmarkPairs, temperature: float, threshold: float) -> np.ndarray:
    """``(N,)`` credit with a given threshold."""
    with np.errstate(invalid="ignore"):
        lead = np.tanh(_gap(pairs) / (2 * temperature))  # p0 - p1
        answer = np.where(np.abs(lead) <= threshold, TIE, np.sign(lead))
    people = _published_choice(pairs)
    return np.where(answer == people, 1.0, np.where((answer == TIE) | (people == TIE), 0.5, 0.0))


def _gap(pairs: BenchmarkPairs) -> np.ndarray:
    return pairs.first - pairs.second


def _published_choice(pairs: BenchmarkPairs) -> np.ndarray:
    published = pairs.columns.get("label_0")
    labels = pairs.labels if published is None else np.array([np.nan if x is None else float(x) for x in published])
    return np.where(labels == 0.5, TIE, np.where(labels == 1, FIRST, SECOND))
