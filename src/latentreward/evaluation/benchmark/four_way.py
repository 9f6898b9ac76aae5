"""Four answers of GenAI-Bench (left, right, both good, both bad) from two scores."""

from typing import Any

import numpy as np

from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.metrics.calibration import two_folds

VOTES = ("leftvote", "rightvote", "tievote", "bothbad_vote")
LEFT, RIGHT, GOOD, BAD = range(4)
GAP_QUANTILES = np.linspace(0, 1, 101)


def four_way_credit(pairs: BenchmarkPairs, votes: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    r"""Credit of every pair by a rule of ours for the four classes of GenAI-Bench's leaderboard (arXiv:2406.04485).

    The leaderboard asks models that answer in words; for scores no rule was published. Here, with gap
    :math:`d = s_a - s_b` and mean :math:`m = (s_a + s_b)/2`, the answer is left where :math:`d > \tau`, right where
    :math:`d < -\tau`, and otherwise both good where :math:`m > \mu`, both bad elsewhere. The thresholds τ ≥ 0 and μ
    maximise the share of right answers on one half of the prompt groups and are used on the other, and the other way
    round, so that none is fitted on a pair that it judges. τ is sought among 0 and the percentiles of |d|, μ among all
    midpoints of means; of equally good ones the smallest τ, then the smallest μ. That μ is one number supposes
    scores that compare across prompts.

    Args:
        pairs: Scores.
        votes: ``(N,)`` names of the votes, of ``VOTES`` where the pair counts.
        counted: ``(N,)`` bool.

    Returns:
        ``(N,)`` credit, 1 or 0, and details: ``thresholds`` (gap, mean) of either half, ``votes`` of each kind,
        ``most_frequent`` the share of the most frequent vote: what a constant answer reaches.
    """
    gap, mean = pairs.first - pairs.second, (pairs.first + pairs.second) / 2
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
    """``(N,)`` number of the answer to each pair."""
    return np.where(gap > tau, LEFT, np.where(gap < -tau, RIGHT, np.where(mean > mu, GOOD, BAD)))


def fit_thresholds(gap: np.ndarray, mean: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """τ and μ with most right answers; 0 and -inf without pairs."""
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
