"""Writer of a policy report as JSON, Markdown and HTML, and of a CSV file with every score of every picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from latentreward.evaluation.policy.page import write_policy_page
from latentreward.evaluation.policy.results import PolicyReport, ScoredPictures
from latentreward.evaluation.policy.tables import group_tables, published_tables, score_table
from latentreward.reports.json import json_report
from latentreward.reports.markdown import markdown_report
from latentreward.reports.tables import Section, Table, without_unset
from latentreward.storage.durable import write_file

JSON, MARKDOWN, HTML, SCORES = "report.json", "report.md", "report.html", "scores.csv"
INTRODUCTION = (
    "Means over pictures, with 95 % intervals by resampling prompts (percentile bootstrap). With few prompts an "
    "interval is too narrow; if there are fewer than 30, their number follows the interval, as in (12 groups). "
    "Pictures of two policies are compared in pairs with the same prompt and number. The win rate is the share of "
    "pairs in which the first policy scores higher; a tie counts one half, so 50 % means no difference."
)


def write_report(folder: Path, report: PolicyReport, scored: Sequence[ScoredPictures], cards: int) -> None:
    """Write ``report.json``, ``report.md``, ``report.html`` and ``scores.csv``.

    Each file is replaced only by a complete new one. Pictures of policies are paired as by
    :func:`~latentreward.evaluation.policy.statistics.in_common`; the page shows ``cards`` pictures of each at most.
    """
    write_file(folder / JSON, json_report(report))
    write_file(folder / MARKDOWN, markdown(report))
    write_file(folder / SCORES, _scores(scored))
    write_policy_page(folder / HTML, report, INTRODUCTION, sections(report), scored, cards)


def sections(report: PolicyReport) -> list[Section]:
    """List all sections that have tables, in the order of the report."""
    what = [
        *(("policy", *item) for item in report.policies.items()),
        *(("score", name, without_unset(identity)) for name, identity in report.scorers.items()),
    ]
    found = [
        Section("scores", "Scores", "", (score_table(report),)),
        Section("groups", "By group of prompts", "", tuple(group_tables(report))),
        Section("published", "Published numbers of this protocol", "", tuple(published_tables(report))),
        Section("compared", "What was compared", "", (Table(("kind", "name", "what it is"), tuple(what)),)),
    ]
    return [section for section in found if section.tables]


def markdown(report: PolicyReport) -> str:
    """Return the report as Markdown."""
    return markdown_report(" against ".join(report.policies), report.notes, INTRODUCTION, sections(report))


def _scores(scored: Sequence[ScoredPictures]) -> str:
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
