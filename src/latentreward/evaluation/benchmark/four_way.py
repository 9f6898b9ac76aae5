"""Four-way answers of GenAI-Bench (left, right, both good, both bad) computed from two scores."""

from typing import Any

import numpy as np

from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.metrics.calibration import two_folds

VOTES = ("leftvote", "rightvote", "tievote", "bothbad_vote")
LEFT, RIGHT, GOOD, BAD = range(4)
GAP_QUANTILES = np.linspace(0, 1, 101)


def four_way_credit(pairs: BenchmarkPairs, votes: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    r"""Compute the credit of every pair for the four classes of GenAI-Bench's leaderboard (arXiv:2406.04485).

    The leaderboard evaluates models that answer in words and publishes no rule for scores, so this rule is ours. With
    gap :math:`d = s_a - s_b` and mean :math:`m = (s_a + s_b)/2`, the answer is left where :math:`d > \tau`, right where
    :math:`d < -\tau`, and otherwise both good where :math:`m > \mu`, both bad elsewhere. The prompt groups are cut into
    two halves; the thresholds τ ≥ 0 and μ for one half maximise the share of right answers on the other half, so no
    threshold is fitted on a pair that it judges. Candidates for τ are 0 and the percentiles of |d|, candidates for μ
    the midpoints between neighbouring means; among equally good candidates the smallest τ is taken, then the smallest
    μ. One μ for all prompts assumes that scores are comparable across prompts.

    Args:
        pairs: Scored pairs of one scorer.
        votes: ``(N,)`` names of the votes; one of ``VOTES`` for every pair that counts.
        counted: ``(N,)`` bool, whether the pair counts.

    Returns:
        ``(N,)`` credit, 1 or 0, and a dict of details: ``thresholds`` (τ, μ) of each half, ``votes`` (number of each
        kind), and ``most_frequent`` (share of the most frequent vote, which a constant answer would reach).
    """
    gap, mean = pairs.gap, (pairs.first + pairs.second) / 2
    classes = np.array([VOTES.index(vote) if vote in VOTES else -1 for vote in votes.tolist()], dtype=np.int64)
    credit, thresholds = np.zeros(len(gap)), []
    second_half = two_folds(pairs.group_codes)
    for half in (False, True):
        rows, others = counted & (second_half == half), counted & (second_half != half)
        tau, mu = fit_thresholds(gap[others], mean[others], classes[others])
        credit[rows] = answers(gap[rows], mean[rows], tau, mu) == classes[rows]
        thresholds.append((tau, mu))
    counts = np.bincount(classes[counted], minlength=len(VOTES))
    details = {
        "thresholds": thresholds,
        "votes": dict(zip(VOTES, counts.tolist(), strict=True)),
        "most_frequent": float(counts.max() / counts.sum()) if counts.any() else float("nan"),
    }
    return credit, details


def answers(gap: np.ndarray, mean: np.ndarray, tau: float, mu: float) -> np.ndarray:
    """Return the ``(N,)`` index in ``VOTES`` of the answer to each pair."""
    return np.where(gap > tau, LEFT, np.where(gap < -tau, RIGHT, np.where(mean > mu, GOOD, BAD)))


def fit_thresholds(gap: np.ndarray, mean: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """Return the thresholds τ and μ that give the most right answers; 0 and -inf without pairs."""
    if not len(gap):
        return 0.0, -np.inf
    order = np.argsort(mean, kind="stable")
    gap, mean, classes = gap[order], mean[order], classes[order]
    cuts = np.concatenate([[-np.inf], (mean[1:] + mean[:-1]) / 2, [np.inf]])
    possible = np.concatenate([[True], mean[1:] > mean[:-1], [True]])
    best = (-1.0, 0.0, -np.inf)
    for tau in np.unique([0.0, *np.quantile(np.abs(gap), GAP_QUANTILES)]):
        even = np.abs(gap) <= tau
        decided = ((gap > tau) & (classes == LEFT)) | ((gap < -tau) & (classes == RIGHT))
        bad_below = np.concatenate([[0], np.cumsum(even & (classes == BAD))])
        good_below = np.concatenate([[0], np.cumsum(even & (classes == GOOD))])
        right = np.where(possible, bad_below + good_below[-1] - good_below, -1)
        cut = int(np.argmax(right))
        if (hits := float(decided.sum() + right[cut])) > best[0]:
            best = (hits, float(tau), float(cuts[cut]))
    return best[1], best[2]
