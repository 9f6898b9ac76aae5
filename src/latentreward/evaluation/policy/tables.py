"""Tables of a report as text, for Markdown, HTML and the terminal."""

import math
from collections.abc import Iterator

from latentreward.evaluation.policy.results import Comparison, PolicyReport, PolicyScore
from latentreward.reports.tables import NOTHING, Table, with_interval


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
    names = list(report.policies)
    whole = {result.score: result for result in report.comparisons if not result.group}
    rows = []
    for score in dict.fromkeys(result.score for result in report.scores):
        own = {result.policy: result for result in report.scores if result.score == score}
        of_groups = own[names[0]].headline == "mean_of_groups" and own[names[0]].mean_of_groups is not None
        label = f"{score} (mean of groups)" if of_groups else score
        rows.append(
            (label, *(with_interval(own[name].estimate, number) for name in names), *_compared(whole.get(score)))
        )
    compared = ("difference", "win rate %", "wins / ties / losses") if whole else ()
    return Table(("score", *names, *compared), tuple(rows))


def _compared(result: Comparison | None) -> tuple[str, ...]:
    if result is None:
        return ()
    return (
        with_interval(result.difference, signed),
        with_interval(result.win_rate),
        f"{result.wins} / {result.ties} / {result.losses}",
    )


def group_tables(report: PolicyReport) -> Iterator[Table]:
    """Yield a table for each score, with a row per group of prompts."""
    names = list(report.policies)
    for score in dict.fromkeys(result.score for result in report.scores if result.groups):
        own = {result.policy: result for result in report.scores if result.score == score}
        by_group = {result.group: result for result in report.comparisons if result.score == score and result.group}
        rows = [
            (group, *_group_cells(own, names, place), *_compared(by_group.get(group)))
            for place, group in enumerate(item.group for item in own[names[0]].groups)
        ]
        rows += [("mean over pictures", "", *(with_interval(own[name].mean, number) for name in names), *[""] * 3)]
        if own[names[0]].mean_of_groups is not None:
            means = [own[name].mean_of_groups for name in names]
            rows += [("mean of groups", "", *(with_interval(mean, number) for mean in means if mean), *[""] * 3)]
        compared = ("difference", "win rate %", "wins / ties / losses") if by_group else ()
        width = 2 + len(names) + len(compared)
        yield Table(("group", "prompts", *names, *compared), tuple(row[:width] for row in rows), caption=score)


def _group_cells(own: dict[str, PolicyScore], names: list[str], place: int) -> Iterator[str]:
    yield str(own[names[0]].groups[place].prompts)
    for name in names:
        group = own[name].groups[place]
        spread = "" if math.isnan(group.parts_sd) else f", parts' sd {number(group.parts_sd)}"
        yield with_interval(group.estimate, number) + spread


def published_tables(report: PolicyReport) -> Iterator[Table]:
    """Yield a table of scores that the protocol's authors published, beside ours; nothing if there are none."""
    if not report.published:
        return
    scores = list(dict.fromkeys(one.score for one in report.published))
    theirs = {(one.model, one.score): number(one.value) for one in report.published}
    ours = {(one.policy, one.score): number(one.estimate.value) for one in report.scores}
    models = list(dict.fromkeys(one.model for one in report.published))
    rows = [(name, *(ours.get((name, score), NOTHING) for score in scores), "this run") for name in report.policies] + [
        (model, *(theirs.get((model, score), NOTHING) for score in scores), f"published: {report.published[0].source}")
        for model in models
    ]
    yield Table(("policy", *scores, "source"), tuple(rows))
