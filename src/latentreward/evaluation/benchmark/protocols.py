"""How pairs of scores become a published number: one protocol per key, each with its own idea of ties.

A protocol gives every pair a credit in [0, 1], or leaves it out; the number is the mean credit over pairs (micro), or
the mean over prompt groups of the mean over a group's pairs (macro). Intervals resample prompt groups; thresholds that
a protocol fits stay as fitted. Unreadable images and missing labels leave a pair out and are counted by reason. No
protocol lets a scorer win by equal scores: what each makes of them stands in its ``summary``.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentreward.errors import InputError, did_you_mean
from latentreward.evaluation.benchmark.four_way import VOTES, four_way_credit
from latentreward.evaluation.benchmark.pickscore import pickscore_credit
from latentreward.evaluation.benchmark.results import BenchmarkPairs, ProtocolResult
from latentreward.metrics.bootstrap import clustered_interval, group_sums, ratio

NO_SCORE, NO_LABEL, TIE, NO_VOTE = "no score", "no label", "tie", "no vote"


@dataclass(frozen=True)
class Judgement:
    """What a protocol says of every pair.

    Attributes:
        credit: ``(N,)`` in [0, 1]; NaN where the pair does not count.
        excluded: Reason → pairs that do not count.
        details: What else the protocol tells.
    """

    credit: np.ndarray
    excluded: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """A rule of evaluation.

    Attributes:
        summary: In one line: which pairs, ties of people, equal scores; whose code it follows.
        judge: ``(pairs, fitting)`` to a judgement.
        macro: Whether prompt groups, not pairs, weigh the same.
        fitting_split: Split whose scores it fits a threshold on, if it does.
    """

    summary: str
    judge: Callable[[BenchmarkPairs, BenchmarkPairs | None], Judgement]
    macro: bool = False
    fitting_split: str | None = None


def judge(key: str, pairs: BenchmarkPairs, fitting: BenchmarkPairs | None = None) -> Judgement:
    """Credit of every pair by a protocol.

    Args:
        key: One of ``PROTOCOLS``.
        pairs: Scores of the split that counts.
        fitting: Scores of the same scorer on the protocol's ``fitting_split``, if it has one.

    Raises:
        InputError: If there is no such protocol, or ``fitting`` is missing.
    """
    if key not in PROTOCOLS:
        raise InputError(f"protocol {key!r} is not known{did_you_mean(key, PROTOCOLS)}")
    protocol = PROTOCOLS[key]
    if protocol.fitting_split and fitting is None:
        raise InputError(
            f"protocol {key} fits a threshold on {protocol.fitting_split}; score that split as well, or leave {key} out"
        )
    return protocol.judge(pairs, fitting)


def protocol_result(key: str, pairs: BenchmarkPairs, judgement: Judgement) -> ProtocolResult:
    """The protocol's number, from what :func:`judge` gave."""
    counted = ~np.isnan(judgement.credit)
    sums = credit_sums(key, pairs, judgement.credit)
    return ProtocolResult(
        protocol=key,
        scorer=pairs.scorer,
        estimate=clustered_interval(sums),
        pairs=int(counted.sum()),
        groups=len(sums),
        equal_scores=int((pairs.first == pairs.second)[counted].sum()),
        excluded=judgement.excluded,
        details=judgement.details,
        split=pairs.split,
    )


def credit_sums(key: str, pairs: BenchmarkPairs, credit: np.ndarray) -> np.ndarray:
    """``(groups, 2)`` credit and weight of the groups that count; their ratio over all groups is the number."""
    return _credit_sums(pairs, credit, PROTOCOLS[key].macro)


def protocol_value(key: str, pairs: BenchmarkPairs, judgement: Judgement) -> float:
    """The protocol's number alone, without its interval."""
    return float(ratio(_credit_sums(pairs, judgement.credit, PROTOCOLS[key].macro).sum(axis=0)))


def _credit_sums(pairs: BenchmarkPairs, credit: np.ndarray, macro: bool) -> np.ndarray:
    counted = ~np.isnan(credit)
    sums = group_sums(pairs.group_codes[counted], credit[counted], np.ones(int(counted.sum())))
    return sums / sums[:, 1:] if macro else sums


def leave_out(pairs: BenchmarkPairs, *rules: tuple[str, np.ndarray]) -> np.ndarray:
    """``(N,)`` why each pair does not count, the first rule that holds; empty where it counts.

    A pair without both scores never counts; ``columns["problem"]`` says why it has none.
    """
    unscored = np.isnan(pairs.first) | np.isnan(pairs.second)
    problems = pairs.columns.get("problem", (None,) * len(unscored))
    reasons = np.array([problem or NO_SCORE for problem in problems], dtype=object)
    reasons[~unscored] = ""
    for reason, rows in rules:
        reasons[rows & (reasons == "")] = reason
    return reasons


def _judged(credit: np.ndarray, reasons: np.ndarray, details: dict[str, Any] | None = None) -> Judgement:
    counted = reasons == ""
    excluded = Counter(reasons[~counted].tolist())
    return Judgement(np.where(counted, credit, np.nan), dict(excluded.most_common()), details or {})


def judge_strict(pairs: BenchmarkPairs, _: BenchmarkPairs | None = None) -> Judgement:
    """1 if the preferred image scores higher; ties of people are left out, equal scores are wrong."""
    reasons = leave_out(pairs, (NO_LABEL, np.isnan(pairs.labels)), (TIE, pairs.labels == 0.5))
    return _judged(_agreement(pairs) > 0, reasons)


def judge_soft(pairs: BenchmarkPairs, _: BenchmarkPairs | None = None) -> Judgement:
    """The label's share of the image that scores higher: a tie gives ½ to either choice, equal scores get nothing."""
    reasons = leave_out(pairs, (NO_LABEL, np.isnan(pairs.labels)))
    chosen = np.where(pairs.first > pairs.second, pairs.labels, 1 - pairs.labels)
    return _judged(np.where(pairs.first == pairs.second, 0, chosen), reasons)


def judge_inversions(pairs: BenchmarkPairs, _: BenchmarkPairs | None = None) -> Judgement:
    """1 unless people and scores order the two images against each other; a tie of people agrees with any order.

    HPSv2 orders images by argsort, which leaves the order of equal scores to chance; ½ is what that expects. MPS
    counts equal scores as agreeing, by which a constant score is always right: ``equal_scores_agree`` among the
    details is the number by that rule.
    """
    reasons = leave_out(pairs, (NO_LABEL, np.isnan(pairs.labels)))
    agreeing = _agreement(pairs) >= 0
    by_chance = (pairs.first == pairs.second) & (pairs.labels != 0.5)
    sums = _credit_sums(pairs, np.where(reasons == "", agreeing, np.nan), macro=True)
    details = {"equal_scores_agree": float(ratio(sums.sum(axis=0)))}
    return _judged(np.where(by_chance, 0.5, agreeing), reasons, details)


def judge_pickscore(pairs: BenchmarkPairs, fitting: BenchmarkPairs | None) -> Judgement:
    """See :func:`~latentreward.evaluation.benchmark.pickscore.pickscore_credit`."""
    assert fitting is not None
    credit, details = pickscore_credit(pairs, fitting)
    return _judged(credit, leave_out(pairs), details)


def judge_four_way(pairs: BenchmarkPairs, _: BenchmarkPairs | None = None) -> Judgement:
    """See :func:`~latentreward.evaluation.benchmark.four_way.four_way_credit`."""
    votes = np.array(pairs.columns.get("vote", (None,) * len(pairs.pair_ids)), dtype=object)
    reasons = leave_out(pairs, (NO_VOTE, ~np.isin(votes, VOTES)))
    credit, details = four_way_credit(pairs, votes, reasons == "")
    return _judged(credit, reasons, details)


def _agreement(pairs: BenchmarkPairs) -> np.ndarray:
    """1, 0 or -1 where people and scores order two images alike, one of them does not order them, or they differ."""
    return np.sign(pairs.first - pairs.second) * np.sign(pairs.labels - 0.5)


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
        "mean over prompts of 1 - inversions / pairs; ties of people agree, equal scores agree by half (HPSv2's "
        "evaluate, whose argsort orders them by chance)",
        judge_inversions,
        macro=True,
    ),
    "hpdv2/micro": Protocol(f"share of all pairs of different rank; {WRONG}", judge_strict),
    "hpdv3": Protocol(f"share of all rows; {WRONG} (HPSv3's evaluate.py)", judge_strict),
    "pickapic/pickscore": Protocol(
        "mean credit of left, right or tie, a tie where |p0 - p1| is within a threshold fitted on "
        "validation_unique; ½ if one of both is a tie; equal scores are a tie (PickScore's evaluation)",
        judge_pickscore,
        fitting_split="validation_unique",
    ),
    "pickapic/lrm": Protocol(
        "mean label of the image that scores higher, ½ for a tie of people; equal scores get nothing (LRM's "
        "evaluation)",
        judge_soft,
    ),
    "pickapic/strict": Protocol(f"share of pairs without ties; {WRONG} (SPO)", judge_strict),
    "genai_bench_tiger/no_tie": Protocol(f"share of left and right votes; {WRONG} (UnifiedReward)", judge_strict),
    "genai_bench_tiger/4way": Protocol(
        "share of votes left, right, both good, both bad told from gap and mean of two scores, with cross-fitted "
        "thresholds; the leaderboard publishes no rule for scores, so this one is ours",
        judge_four_way,
    ),
    "genai_bench_cmu": Protocol(
        f"share of a prompt's pairs whose mean ratings differ, all prompts together; {WRONG}",
        judge_strict,
    ),
    "pairs/strict": Protocol(f"share of pairs without ties whose likelier image scores higher; {WRONG}", judge_strict),
    "pairs/soft": Protocol("mean label of the image that scores higher; equal scores get nothing", judge_soft),
}
"""Name in formats and reports -> rule."""
