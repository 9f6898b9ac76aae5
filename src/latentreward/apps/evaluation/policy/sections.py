"""Sections of a report on one or two policies, as tables of text, and cards of their pictures for the HTML page."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from latentreward.apps.evaluation.policy.statistics import PolicyReport, ScoredPictures, headline
from latentreward.core.contracts import ImageRef, sources_of
from latentreward.core.reports.drawing import picture_uri
from latentreward.core.reports.tables import NOTHING, Row, Section, Table, grouped, with_interval, without_unset
from latentreward.data import decode_image

INTRODUCTION = (
    "Means over pictures, with 95 % intervals by resampling prompts (percentile bootstrap). With few prompts an "
    "interval is too narrow; if there are fewer than 30, their number follows the interval, as in (12 groups). "
    "Pictures of two policies are compared in pairs with the same prompt and number. The win rate is the share of "
    "pairs in which the first policy scores higher; a tie counts one half, so 50 % means no difference."
)
STATES = (
    "Correlation within prompts of the reward's scores after some steps with its scores of the finished samples, with "
    "95 % intervals by resampling prompts: ρ of pruned rollouts (pruning.after_steps)."
)
COMPARED = ("difference", "win rate %", "wins / ties / losses")


def sections(report: PolicyReport) -> list[Section]:
    """List all sections that have tables, in the order of the report."""
    what = [
        *(("policy", *item) for item in report.policies.items()),
        *(("score", name, without_unset(identity)) for name, identity in report.scorers.items()),
    ]
    found = [
        Section("Scores", "", [score_table(report)]),
        Section("By group of prompts", "", list(group_tables(report))),
        Section("Scores of noisy states", STATES, [states_table(report)] if report.states else []),
        Section("Published numbers of this protocol", "", [published_table(report)] if report.published else []),
        Section("What was compared", "", [Table(("kind", "name", "what it is"), tuple(what))]),
    ]
    return [section for section in found if section.tables]


def number(value: float) -> str:
    """Format a score with 2, 3 or 4 digits after the point, the more the smaller: ``21.69``, ``5.468``, ``-0.0080``."""
    if math.isnan(value):
        return NOTHING
    digits = 4 if abs(value) < 1 else 3 if abs(value) < 10 else 2
    return f"{value:.{digits}f}"


def signed(value: float) -> str:
    """Format a difference like :func:`number`, with ``+`` before a positive value."""
    return f"+{number(value)}" if value > 0 else number(value)


def score_table(report: PolicyReport) -> Table:
    """Build the main table: a row per score; columns for each policy, the difference and the win rate."""
    whole = {row["score"]: row for row in report.comparisons if not row["group"]}
    rows = []
    for (score,), own in grouped(report.scores, "score").items():
        means = [headline(one) for one in own]
        label = score if means[0] is own[0]["mean"] else f"{score} (mean of groups)"
        rows.append((label, *(with_interval(mean, number) for mean in means), *_compared(whole.get(score))))
    return Table(("score", *report.policies, *(COMPARED if whole else ())), tuple(rows))


def states_table(report: PolicyReport) -> Table:
    """Build the table of correlations of noisy states; a row per step, a column per policy."""
    rows = [
        (str(step), f"{own[0]['sigma']:.3f}", *(with_interval(one["correlation"], number) for one in own))
        for (step,), own in grouped(report.states, "after_steps").items()
    ]
    return Table(("after steps", "σ", *dict.fromkeys(one["policy"] for one in report.states)), tuple(rows))


def group_tables(report: PolicyReport) -> Iterator[Table]:
    """Yield a table for each score, with a row per group of prompts."""
    for (score,), own in grouped((row for row in report.scores if row["groups"]), "score").items():
        by_group = {row["group"]: row for row in report.comparisons if row["score"] == score and row["group"]}
        compared, left = (COMPARED, [""] * 3) if by_group else ((), [])
        rows = [
            (
                groups[0]["group"],
                str(groups[0]["prompts"]),
                *map(_mean, groups),
                *_compared(by_group.get(groups[0]["group"])),
            )
            for groups in zip(*(one["groups"] for one in own), strict=True)
        ]
        for kind, label in (("mean", "mean over pictures"), ("mean_of_groups", "mean of groups")):
            if own[0][kind] is not None:
                rows.append((label, "", *(with_interval(one[kind], number) for one in own), *left))
        yield Table(("group", "prompts", *report.policies, *compared), tuple(rows), score)


def _mean(group: Row) -> str:
    spread = "" if math.isnan(group["parts_sd"]) else f", parts' sd {number(group['parts_sd'])}"
    return with_interval(group["estimate"], number) + spread


def _compared(row: Row | None) -> Sequence[str]:
    if row is None:
        return ()
    counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
    return with_interval(row["difference"], signed), with_interval(row["win_rate"]), counts


def published_table(report: PolicyReport) -> Table:
    """Build the table of scores that the protocol's authors published, beside ours."""
    scores = list(dict.fromkeys(one["score"] for one in report.published))
    ours = {(one["policy"], one["score"]): number(headline(one).value) for one in report.scores}
    theirs = {(one["model"], one["score"]): number(one["value"]) for one in report.published}
    source = f"published: {report.published[0]['source']}"
    rows = [
        (name, *(values.get((name, score), NOTHING) for score in scores), where)
        for values, where in ((ours, "this run"), (theirs, source))
        for name in dict.fromkeys(name for name, _ in values)
    ]
    return Table(("policy", *scores, "source"), tuple(rows))


def side_by_side(scored: Sequence[ScoredPictures], cards: int) -> dict[str, Any]:
    """Return the values of the page's template for one policy, or two with pictures of the same prompts and numbers.

    At most ``cards`` pictures of each policy are chosen, at evenly spaced ranks of the difference of the two policies'
    first score (with one policy, of the first score).
    """
    names = list(scored[0].scores)
    rows = shown_rows(scored, cards)
    groups = sorted({scored[0].pictures[row].group for row in rows} - {""})
    return {
        "policies": [policy.policy for policy in scored],
        "scores": names,
        "groups": groups,
        "cards": [_card(row, scored, names, groups) for row in rows],
        "pictures": len(scored[0].pictures),
    }


def shown_rows(scored: Sequence[ScoredPictures], cards: int) -> list[int]:
    """Return the rows of the pictures to show, in ascending order."""
    count = len(scored[0].pictures)
    order = np.argsort(_sort_values(scored, next(iter(scored[0].scores))), kind="stable")
    chosen = np.linspace(0, count - 1, min(cards, count)).round().astype(int)
    return sorted(order[chosen].tolist())


def _sort_values(scored: Sequence[ScoredPictures], name: str) -> np.ndarray:
    """Return ``(N,)``: the first policy's score minus the second's; with one policy, the score itself."""
    first = scored[0].scores[name]
    return first - scored[1].scores[name] if len(scored) > 1 else first


def _card(row: int, scored: Sequence[ScoredPictures], names: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
    picture, rows, several = scored[0].pictures[row], [], len(scored) > 1
    gaps = {name: _sort_values(scored, name)[row] for name in names}
    for name, gap in gaps.items():
        values = [number(policy.scores[name][row]) for policy in scored]
        verdict = "" if gap == 0 or not several else "good" if gap > 0 else "bad"
        rows.append({"name": name, "values": values, "gap": signed(gap) if several else "", "verdict": verdict})
    files = [(policy.policy, policy.pictures[row]) for policy in scored]
    shown = [("source", image) for image in sources_of(picture.prompt)]
    shown += [(name, ImageRef(file.file, path=file.path)) for name, file in files]
    return {
        "prompt": picture.prompt,
        "group": picture.group,
        "group_number": groups.index(picture.group) if picture.group else -1,
        "number": f"{picture.place} / {picture.image}",
        "pictures": [{"policy": name, "uri": picture_uri(decode_image(image), side=256)} for name, image in shown],
        "rows": rows,
        "sort": [f"{gap:.8g}" for gap in gaps.values()],
    }
