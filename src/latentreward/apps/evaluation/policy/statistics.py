"""Results of a run: means, win rates and differences by resampling prompts, and the report's sections and cards."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from latentreward.apps.evaluation.results import number, result_table, signed
from latentreward.core import bootstrap
from latentreward.core.contracts import ImageRef, sources_of
from latentreward.core.reports.drawing import picture_uri
from latentreward.core.reports.tables import Row, Section, Table, without_unset
from latentreward.data import decode_image
from latentreward.reward.scorers.tools import JudgedPicture


@dataclass(frozen=True)
class ScoredPictures:
    """Pictures of one policy with all scores."""

    policy: str  # name of the policy
    pictures: tuple[JudgedPicture, ...]  # N pictures, in order of prompts and of numbers within a prompt
    scores: dict[str, np.ndarray]  # name of a score → ``(N,)`` float64


def scores_csv(scored: Sequence[ScoredPictures]) -> str:
    """Return the text of ``scores.csv``: a line for each picture with all its scores."""
    names = list(scored[0].scores)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["policy", "place", "image", "group", "file", "prompt", *names])
    for policy in scored:
        for row, picture in enumerate(policy.pictures):
            values = [f"{policy.scores[name][row]:.8g}" for name in names]
            own = [picture.place, picture.image, picture.group, picture.file, picture.prompt]
            writer.writerow([policy.policy, *own, *values])
    return text.getvalue()


@dataclass(frozen=True)
class PolicyReport:
    """Results of one run of ``latentreward evaluate-policy``."""

    policies: dict[str, str]  # name of a policy → description in one line
    scorers: dict[str, str]  # name of a scorer → identity in one line
    # Rows with the result of one ``policy`` by one ``score``. ``headline``: name of the value that the score's own
    # protocol reports. ``mean``: Interval of the mean over all pictures, by resampling prompts. ``mean_of_groups``:
    # that of the mean of the groups' means; None with one group. ``groups``: rows with the result of each ``group`` of
    # prompts; empty with one group that is not cut into parts. ``pictures`` and ``prompts``: their numbers. The row of
    # a group has ``prompts``, ``mean`` (over the group's pictures) and ``parts_sd``, the standard deviation of the
    # means of consecutive parts of the group's prompts, NaN with one part.
    scores: Sequence[Row]
    # Rows that compare the two policies by one ``score``, over pairs of pictures with the same prompt and number; empty
    # with one policy. ``group``: group of prompts, empty for all. ``win_rate``: share of pairs in which the first
    # policy scores higher; ties count ½. ``difference``: mean of the first policy's score minus the second's, of the
    # kind that ``headline`` of ``scores`` names. ``wins``, ``ties``, ``losses`` and ``prompts``: their numbers.
    comparisons: Sequence[Row] = ()
    # Settings of the run, and versions of the packages that computed it
    settings: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()  # remarks shown before all numbers


def policy_scores(scored: ScoredPictures, headlines: Mapping[str, str], parts: int = 1) -> list[Row]:
    """Compute the means of each score of a policy, rows of :attr:`PolicyReport.scores`.

    ``headlines`` are ``mean`` or ``mean_of_groups`` by name of a score. The prompts of each group are cut into
    ``parts`` consecutive parts, and the standard deviation of the parts' means is reported. HPSv2 reports ten parts of
    80 prompts.
    """
    prompts, groups = prompt_numbers(scored), np.array([picture.group for picture in scored.pictures])
    places = np.array([picture.place for picture in scored.pictures])
    chosen = {kind: groups == kind for kind in dict.fromkeys(groups.tolist())}
    several, found = len(chosen) > 1, list[Row]()
    for name, values in scored.scores.items():
        by_group = list[Row]()
        for kind, rows in chosen.items():
            order, own = np.unique(places[rows]), values[rows]
            cut = np.array_split(order, min(parts, len(order)))
            spread = float(np.std([own[np.isin(places[rows], part)].mean() for part in cut])) if parts > 1 else np.nan
            mean = bootstrap.clustered_mean(own, prompts[rows])
            by_group.append({"group": kind, "prompts": len(order), "mean": mean, "parts_sd": spread})
        found.append(
            {
                "policy": scored.policy,
                "score": name,
                "headline": headlines[name],
                "mean": bootstrap.clustered_mean(values, prompts),
                "mean_of_groups": mean_of_groups(values, prompts, groups) if several else None,
                "groups": by_group if several or parts > 1 else [],
                "pictures": len(values),
                "prompts": len(set(places.tolist())),
            }
        )
    return found


def prompt_numbers(scored: ScoredPictures) -> np.ndarray:
    """Return the ``(N,)`` number of each picture's prompt; equal texts, whose pictures are dependent, share one."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(picture.prompt, len(numbers)) for picture in scored.pictures])


def mean_of_groups(values: np.ndarray, prompts: np.ndarray, groups: np.ndarray) -> bootstrap.Interval:
    """Compute the mean of the groups' means, as GenEval reports it, with an interval by resampling prompts.

    A resample without prompts of some group averages the other groups. All arguments are ``(N,)``, one entry per
    picture: its score, the number of its prompt, and the name of the prompt's group.
    """
    members = [groups == kind for kind in np.unique(groups)]
    columns = [column for member in members for column in (np.where(member, values, 0.0), member.astype(float))]

    def mean_of_means(sums: np.ndarray) -> np.ndarray:
        totals, counts = sums[..., 0::2], sums[..., 1::2]
        present = counts > 0
        means = np.divide(totals, counts, out=np.zeros_like(totals), where=present)
        return means.sum(axis=-1) / present.sum(axis=-1)

    return bootstrap.clustered_interval(bootstrap.group_sums(prompts, *columns), mean_of_means)


def compare(first: ScoredPictures, second: ScoredPictures, headlines: Mapping[str, str]) -> list[Row]:
    """Compare two policies by each score, over all prompts and over each group; rows of ``PolicyReport.comparisons``.

    Equal rows of the two hold pictures of one prompt and number.
    ``headlines`` are those of :func:`policy_scores`.
    """
    prompts, groups = prompt_numbers(first), np.array([picture.group for picture in first.pictures])
    kinds = list(dict.fromkeys(groups.tolist()))
    chosen = [("", np.ones(len(prompts), bool)), *((kind, groups == kind) for kind in kinds if len(kinds) > 1)]
    found = list[Row]()
    for name, (group, rows) in product(first.scores, chosen):
        gaps, own = first.scores[name][rows] - second.scores[name][rows], prompts[rows]
        wins, ties = gaps > 0, gaps == 0
        by_groups = headlines[name] == "mean_of_groups"  # as the means that the difference is shown beside
        row = {
            "score": name,
            "group": group,
            "win_rate": bootstrap.clustered_accuracy(bootstrap.group_sums(own, wins + 0.5 * ties, np.ones(len(gaps)))),
            "difference": mean_of_groups(gaps, own, groups[rows]) if by_groups else bootstrap.clustered_mean(gaps, own),
            "wins": int(wins.sum()),
            "ties": int(ties.sum()),
            "losses": int((gaps < 0).sum()),
            "prompts": len(set(own.tolist())),
        }
        found.append(row)
    return found


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
