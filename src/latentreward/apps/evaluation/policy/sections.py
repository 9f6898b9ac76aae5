"""Sections of a report on one or two policies, and cards of their pictures for the HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentreward.apps.evaluation.policy.statistics import PolicyReport, ScoredPictures
from latentreward.apps.evaluation.results import number, result_table, signed
from latentreward.core.contracts import ImageRef, sources_of
from latentreward.core.reports.drawing import picture_uri
from latentreward.core.reports.tables import Section, Table, without_unset
from latentreward.data import decode_image

INTRODUCTION = (
    "Means over pictures, with 95 % intervals by resampling prompts (percentile bootstrap). With few prompts an "
    "interval is too narrow; if there are fewer than 30, their number follows the interval, as in (12 groups). "
    "Pictures of two policies are compared in pairs with the same prompt and number. The win rate is the share of "
    "pairs in which the first policy scores higher; a tie counts one half, so 50 % means no difference."
)


def sections(report: PolicyReport) -> list[Section]:
    """List all sections that have tables, in the order of the report; the first ones are the results."""
    groups = [
        {"policy": row["policy"], "score": row["score"], **group} for row in report.scores for group in row["groups"]
    ]
    what = [
        *(("policy", *item) for item in report.policies.items()),
        *(("score", name, without_unset(identity)) for name, identity in report.scorers.items()),
    ]
    found = {"Scores": report.scores, "Comparison": report.comparisons, "By group of prompts": groups}
    tables = {title: [result_table(rows, hidden=("groups",))] for title, rows in found.items() if rows}
    tables["What was compared"] = [Table(("kind", "name", "what it is"), tuple(what))]
    return [Section(title, "", shown) for title, shown in tables.items()]


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
