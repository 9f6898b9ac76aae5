"""Sections of a report on one or two policies, as tables of text, and cards of their pictures for the HTML page."""

import math
from collections.abc import Iterator, Mapping, Sequence
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


def side_by_side(scored: Sequence[ScoredPictures], cards: int) -> dict[str, Any]:
    """Return the values of the page's template for one policy, or two with pictures of the same prompts and numbers.

    At most ``cards`` pictures of each policy are chosen, at evenly spaced ranks of the difference of the two policies'
    first score (with one policy, of the first score).
    """
    gaps = {name: _gaps(scored, name) for name in scored[0].scores}
    first, count = next(iter(gaps.values())), len(scored[0].pictures)
    chosen = np.linspace(0, count - 1, min(cards, count)).round().astype(int)
    rows = sorted(np.argsort(first, kind="stable")[chosen].tolist())
    groups = sorted({scored[0].pictures[row].group for row in rows} - {""})
    return {
        "policies": [policy.policy for policy in scored],
        "scores": [*gaps],
        "groups": groups,
        "cards": [_card(row, scored, gaps, groups) for row in rows],
        "pictures": count,
    }


def _gaps(scored: Sequence[ScoredPictures], name: str) -> np.ndarray:
    """Return ``(N,)``: the first policy's score minus the second's; with one policy, the score itself."""
    first = scored[0].scores[name]
    return first - scored[1].scores[name] if len(scored) > 1 else first


def _card(
    row: int, scored: Sequence[ScoredPictures], gaps: Mapping[str, np.ndarray], groups: Sequence[str]
) -> dict[str, Any]:
    picture, rows, several = scored[0].pictures[row], [], len(scored) > 1
    for name, all_gaps in gaps.items():
        gap, values = all_gaps[row], [number(policy.scores[name][row]) for policy in scored]
        verdict = "" if gap == 0 or not several else "good" if gap > 0 else "bad"
        rows.append({"name": name, "values": values, "gap": signed(gap) if several else "", "verdict": verdict})
    shown = [("source", image) for image in sources_of(picture.prompt)]
    for policy in scored:
        own = policy.pictures[row]
        shown.append((policy.policy, ImageRef(own.file, path=own.path)))
    return {
        "prompt": picture.prompt,
        "group": picture.group,
        "group_number": groups.index(picture.group) if picture.group else -1,
        "number": f"{picture.place} / {picture.image}",
        "pictures": [{"policy": name, "uri": picture_uri(decode_image(image), side=256)} for name, image in shown],
        "rows": rows,
        "sort": [f"{own[row]:.8g}" for own in gaps.values()],
    }
