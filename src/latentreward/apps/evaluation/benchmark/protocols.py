"""Evaluation protocols: rules that turn pairs of scores into a benchmark's number; each treats ties in its own way.

A protocol gives every pair a credit in [0, 1] or leaves the pair out. The protocol's number is the mean credit over
pairs (micro), or the mean over prompt groups of the mean credit within a group (macro). Intervals resample prompt
groups and do not refit a protocol's thresholds. Pairs with an unreadable image or without a label are left out and
counted by reason; PickScore's protocol counts pairs without a label. In no protocol does a constant score win: each
``summary`` says how equal scores count.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from latentreward.apps.evaluation.benchmark.base import BenchmarkPairs
from latentreward.core.bootstrap import clustered_accuracy, group_sums, ratio
from latentreward.core.errors import InputError, did_you_mean
from latentreward.core.reports.tables import Row
from latentreward.reward.metrics.calibration import fit_temperature

NO_SCORE, NO_LABEL, TIE = "no score", "no label", "tie"
THRESHOLDS = np.arange(11) / 10
GAP_QUANTILES = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Judgement:
    """Judgement of a protocol on every pair of one scorer."""

    protocol: str  # key of the protocol in :data:`PROTOCOLS`
    pairs: BenchmarkPairs  # N pairs
    credit: np.ndarray  # ``(N,)`` in [0, 1]; NaN for a pair that does not count
    excluded: dict[str, int]  # reason → number of pairs that do not count
    details: dict[str, Any]  # further results of the protocol, e.g. a fitted threshold

    @property
    def value(self) -> float:
        """The protocol's number, without its interval."""
        return float(ratio(self.sums(self.credit).sum(axis=0)))

    def sums(self, credit: np.ndarray) -> np.ndarray:
        """Return :func:`credit_sums` by this protocol of a ``credit`` ``(N,)`` of the same pairs."""
        return credit_sums(self.pairs, credit, PROTOCOLS[self.protocol].macro)

    def named(self) -> Row:
        """Return the values by which a row of a report names data set, protocol and scorer."""
        return {"benchmark": self.pairs.benchmark, "protocol": self.protocol, "scorer": self.pairs.scorer}

    def result(self) -> Row:
        """Compute a row of :attr:`BenchmarkReport.protocols`."""
        counted, sums = ~np.isnan(self.credit), self.sums(self.credit)
        return {
            **self.named(),
            "estimate": clustered_accuracy(sums),
            "pairs": int(counted.sum()),
            "groups": len(sums),
            "equal_scores": int((self.pairs.first == self.pairs.second)[counted].sum()),
            "excluded": self.excluded,
            "details": self.details,
        }


Credit = tuple[np.ndarray, np.ndarray, dict[str, Any]]
"""``(N,)`` credit, ``(N,)`` reasons of :func:`leave_out`, and details."""


@dataclass(frozen=True)
class Protocol:
    """Rule of evaluation."""

    summary: str  # for reports: which pairs count, how labelled ties and equal scores count, whose code it follows
    judge: Callable[[BenchmarkPairs, BenchmarkPairs | None], Credit]  # of pairs and those of the fitting split
    macro: bool = False  # whether all prompt groups have the same weight; otherwise all pairs have the same weight


def judge(key: str, pairs: BenchmarkPairs, fitting: BenchmarkPairs | None = None) -> Judgement:
    """Judge every pair by a protocol; ``fitting`` are the scorer's pairs on which a threshold is fitted."""
    if key not in PROTOCOLS:
        raise InputError(f"protocol {key!r} is not known{did_you_mean(key, PROTOCOLS)}")
    credit, reasons, details = PROTOCOLS[key].judge(pairs, fitting)
    counted = reasons == ""
    excluded = Counter(reasons[~counted].tolist())
    return Judgement(key, pairs, np.where(counted, credit, np.nan), dict(excluded.most_common()), details)


def credit_sums(pairs: BenchmarkPairs, credit: np.ndarray, macro: bool) -> np.ndarray:
    """Return ``(groups, 2)``: sums of credit and weight of each prompt group that has a pair that counts.

    The protocol's number is the credit of all groups divided by the weight of all groups. ``macro`` is that of
    :class:`Protocol`.
    """
    counted = ~np.isnan(credit)
    sums = group_sums(pairs.group_codes[counted], credit[counted], np.ones(int(counted.sum())))
    return sums / sums[:, 1:] if macro else sums


def leave_out(pairs: BenchmarkPairs, *rules: tuple[str, np.ndarray]) -> np.ndarray:
    """Return ``(N,)`` reasons why pairs do not count; the reason is empty for a pair that counts.

    A pair that lacks a score never counts; ``columns["problem"]`` holds the reason. A rule is a reason and ``(N,)``
    bool of the pairs to leave out; of several reasons for a pair the first is kept.
    """
    unscored = np.isnan(pairs.first) | np.isnan(pairs.second)
    problems = pairs.columns.get("problem", (None,) * len(unscored))
    reasons = np.array([problem or NO_SCORE for problem in problems], dtype=object)
    reasons[~unscored] = ""
    for reason, rows in rules:
        reasons[rows & (reasons == "")] = reason
    return reasons


def judge_strict(pairs: BenchmarkPairs, _: BenchmarkPairs | None = None) -> Credit:
    """Give credit 1 if the preferred image scores higher, else 0; pairs labelled as ties are left out."""
    reasons = leave_out(pairs, (NO_LABEL, np.isnan(pairs.labels)), (TIE, pairs.labels == 0.5))
    return _agreement(pairs) > 0, reasons, {}


def judge_soft(pairs: BenchmarkPairs, _: BenchmarkPairs | None = None) -> Credit:
    """Give the label of the image that scores higher as credit: ½ for a labelled tie; equal scores get 0."""
    reasons = leave_out(pairs, (NO_LABEL, np.isnan(pairs.labels)))
    chosen = np.where(pairs.first > pairs.second, pairs.labels, 1 - pairs.labels)
    return np.where(pairs.first == pairs.second, 0, chosen), reasons, {}


def judge_inversions(pairs: BenchmarkPairs, _: BenchmarkPairs | None = None) -> Credit:
    """Give credit 0 if label and scores order the two images in opposite ways, else 1; equal scores get ½.

    A labelled tie gets 1 with any scores, equal ones included. HPSv2 orders images by argsort, which leaves the order
    of equal scores to chance; ½ is the expected credit. MPS counts equal scores as right, so that a constant score
    would always be right; ``equal_scores_agree`` in the details is the protocol's number by MPS's rule.
    """
    reasons = leave_out(pairs, (NO_LABEL, np.isnan(pairs.labels)))
    agreeing = _agreement(pairs) >= 0
    by_chance = (pairs.first == pairs.second) & (pairs.labels != 0.5)
    sums = credit_sums(pairs, np.where(reasons == "", agreeing, np.nan), macro=True)
    details = {"equal_scores_agree": float(ratio(sums.sum(axis=0)))}
    return np.where(by_chance, 0.5, agreeing), reasons, details


def _agreement(pairs: BenchmarkPairs) -> np.ndarray:
    """Return 1 where label and scores order two images alike, -1 where opposite, 0 where either one is a tie."""
    return np.sign(pairs.gap) * np.sign(pairs.labels - 0.5)


def judge_pickscore(pairs: BenchmarkPairs, fitting: BenchmarkPairs | None) -> Credit:
    r"""Judge by the evaluation of PickScore's released code (arXiv:2305.01569).

    With :math:`p = \mathrm{softmax}(s / T)` of a pair's two scores, the answer is a tie where
    :math:`|p_0 - p_1| \le \theta`, else the image with the higher score. An answer gets credit 1 if it equals the
    people's answer, ½ if exactly one of the two answers is a tie, else 0. The threshold θ is the first of 0, 0.1, … 1
    with the highest mean credit on the fitting split. All rows count, as in the released code: ``label_0`` = ½ means a
    tie, 1 the first image, and any other value, null included, the second image.

    ``columns["label_0"]`` holds the published labels; without that column ``labels`` are used. ``temperature`` is T: 1
    for scores that are logits, such as PickScore's; None fits T on the fitting split. The details are ``threshold``,
    ``temperature``, ``credit_by_threshold`` (on the fitting split) and ``credit_without_threshold``.
    """
    if fitting is None:
        raise InputError(
            "protocol pickapic/pickscore fits a threshold on validation_unique; score that split as well, or leave "
            "pickapic/pickscore out"
        )
    fitted, temperature = ~np.isnan(fitting.gap), pairs.temperature
    if temperature is None:
        temperature = fit_temperature(fitting.gap[fitted], fitting.labels[fitted])
    thresholds = THRESHOLDS.tolist() if fitted.any() else []
    curve = [float(credit_at(fitting, temperature, theta)[fitted].mean()) for theta in thresholds]
    threshold = float(THRESHOLDS[int(np.argmax(curve))]) if curve else 0.0
    scored = ~np.isnan(pairs.gap)
    plain = credit_at(pairs, temperature, 0.0)[scored]
    details = {
        "threshold": threshold,
        "temperature": temperature,
        "credit_by_threshold": curve,
        "credit_without_threshold": float(plain.mean()) if len(plain) else float("nan"),
    }
    return credit_at(pairs, temperature, threshold), leave_out(pairs), details


def credit_at(pairs: BenchmarkPairs, temperature: float, threshold: float) -> np.ndarray:
    """Return the ``(N,)`` credit with a given temperature and threshold; an answer is 1, 0 (tie) or -1."""
    with np.errstate(invalid="ignore"):
        lead = np.tanh(pairs.gap / (2 * temperature))  # p0 - p1
        answer = np.where(np.abs(lead) <= threshold, 0, np.sign(lead))
    published = pairs.columns.get("label_0")
    labels = pairs.labels if published is None else np.array([np.nan if x is None else float(x) for x in published])
    people = np.where(labels == 0.5, 0, np.where(labels == 1, 1, -1))
    return np.where(answer == people, 1.0, np.where((answer == 0) | (people == 0), 0.5, 0.0))


def judge_groups(pairs: BenchmarkPairs, _: BenchmarkPairs | None = None, only: int | None = None) -> Credit:
    r"""Judge whole groups of K results of one edit, as EditReward-Bench does (arXiv:2509.26346).

    A group is right if all its pairs are. Of a pair of two results (K = 2), the answer is a tie where
    :math:`|s_a - s_b| \le \tau`, else the result with the higher score; it must be the people's. As published, τ is
    tuned on the very set: of 0 and the percentiles of the gaps the first with the most right answers. Among more
    results, pairs labelled as ties do not count, and the others must be in the people's order; equal scores are wrong.

    ``only`` leaves out groups of another K after τ is tuned. The details are ``threshold``, and ``accuracy`` and
    ``groups`` by K.
    """
    reasons = leave_out(pairs, (NO_LABEL, np.isnan(pairs.labels)))
    sizes = np.bincount(pairs.group_codes)[pairs.group_codes]
    two, counted = sizes == 1, reasons == ""
    people, gaps = np.sign(pairs.labels - 0.5), np.abs(pairs.gap)
    known = gaps[two & counted]
    taus = np.unique([0.0, *np.quantile(known, GAP_QUANTILES)]) if len(known) else np.zeros(1)
    hits = [np.where(gaps <= tau, 0, np.sign(pairs.gap)) == people for tau in taus]
    best = int(np.argmax([right[two & counted].sum() for right in hits]))
    reasons[~two & (pairs.labels == 0.5) & counted] = TIE
    counted = reasons == ""
    right = np.where(two, hits[best], _agreement(pairs) > 0)
    wrong = np.bincount(pairs.group_codes[counted & ~right], minlength=int(pairs.group_codes.max(initial=-1)) + 1)
    credit = (wrong[pairs.group_codes] == 0).astype(float)
    results = ((1 + np.sqrt(1 + 8 * sizes)) / 2).round().astype(int)  # K (K - 1) / 2 pairs
    if only is not None:
        reasons[counted & (results != only)] = "other number of results"
        counted = reasons == ""
    accuracy, groups = {}, {}
    for count in np.unique(results[counted]).tolist():
        rows = counted & (results == count)
        codes, first = np.unique(pairs.group_codes[rows], return_index=True)
        accuracy[f"K = {count}"], groups[f"K = {count}"] = float(credit[rows][first].mean()), len(codes)
    return credit, reasons, {"threshold": float(taus[best]), "accuracy": accuracy, "groups": groups}


WRONG = "equal scores are wrong"
PROTOCOLS = {
    "imagereward/micro": Protocol(
        f"share of all pairs of different rank; {WRONG} (ImageReward's test.py, MPS, HPSv3)",
        judge_strict,
    ),
    "imagereward/macro": Protocol(
        f"mean over prompts of the share of pairs of different rank; {WRONG} (HPSv2's evaluate)",
        judge_strict,
        macro=True,
    ),
    "hpdv2/macro": Protocol(
        "mean over prompts of 1 - inversions / pairs; a labelled tie counts as right, equal scores count one half "
        "(HPSv2's evaluate, whose argsort orders equal scores by chance)",
        judge_inversions,
        macro=True,
    ),
    "hpdv2/micro": Protocol(f"share of all pairs of different rank; {WRONG}", judge_strict),
    "hpdv3": Protocol(f"share of all rows; {WRONG} (HPSv3's evaluate.py)", judge_strict),
    "pickapic/pickscore": Protocol(
        "mean credit of the answers left, right or tie; the answer is a tie where |p0 - p1| is within a threshold "
        "fitted on validation_unique; credit ½ if either the answer or the label, not both, is a tie; equal scores are "
        "a tie (PickScore's evaluation)",
        judge_pickscore,
    ),
    "pickapic/lrm": Protocol(
        "mean label of the image that scores higher, ½ for a labelled tie; equal scores get nothing (LRM's evaluation)",
        judge_soft,
    ),
    "pickapic/strict": Protocol(f"share of pairs without ties; {WRONG} (SPO)", judge_strict),
    "genai_bench_tiger/no_tie": Protocol(f"share of left and right votes; {WRONG} (UnifiedReward)", judge_strict),
    "genai_bench_cmu": Protocol(
        f"share of all pairs of a prompt's images whose mean ratings differ; {WRONG}",
        judge_strict,
    ),
    "editreward_bench/groups": Protocol(
        "share of groups of 2 to 4 results of an edit that are ordered as people did; ties of two by a threshold that "
        f"is tuned on the set, as published; {WRONG} (EditReward-Bench)",
        judge_groups,
        macro=True,
    ),
    **{
        f"editreward_bench/{count}": Protocol(
            f"the same share of the groups of {count} results", partial(judge_groups, only=count), macro=True
        )
        for count in (2, 3, 4)
    },
    "editreward_bench/pairs": Protocol(f"share of all pairs without ties; {WRONG}", judge_strict),
    "pairs/strict": Protocol(f"share of pairs without ties whose likelier image scores higher; {WRONG}", judge_strict),
    "pairs/soft": Protocol("mean label of the image that scores higher; equal scores get nothing", judge_soft),
}
"""Key of a protocol → protocol."""
