"""Page that answers the papers' questions by one claim each, with the plot of the claims' intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from latentreward.core.errors import InputError
from latentreward.core.reports.tables import NOTHING, with_interval
from latentreward.core.storage.json_files import STRICT, checked
from tools.measured import CLONE
from tools.reproduction.rows import FOLDER, Claim, Row, load_yaml
from tools.reproduction.verdicts import Verdict

FILE = "questions.yaml"
"""File in the folder of the results, beside the folder of the rows."""
PLOT = "reproduction.svg"
TEXT = Path(__file__).with_name("answers.md").read_text(encoding="utf-8")
COLOURS = {"yes": "#009E73", "no": "#D55E00", "equal": "#0072B2", "leans": "#CC79A7", "unknown": "#767676"}
"""First word of an answer → colour."""


@dataclass(frozen=True)
class Question:
    """Question of the papers, and the claim that answers it."""

    __pydantic_config__ = STRICT
    asks: str
    row: str
    claim: str  # what the claim says
    paper: str  # the paper's own effect
    advice: str  # what a reader should do
    second: str = ""  # row of the second world with that claim; by default the one that is `like` the row
    second_claim: str = ""  # what that row's claim says; by default the same


@dataclass(frozen=True)
class Listed:
    """Claims of a row that stay in the list while its others leave it."""

    __pydantic_config__ = STRICT
    row: str
    but: Sequence[str]


@dataclass(frozen=True)
class Unlisted:
    """Rows, and claims of rows, that the list leaves out."""

    __pydantic_config__ = STRICT
    rows: Sequence[str]
    claims: Sequence[Listed]


@dataclass(frozen=True)
class Asked:
    """Content of ``reproduction/questions.yaml``."""

    __pydantic_config__ = STRICT
    questions: Sequence[Question]
    unlisted: Unlisted

    def lists(self, row: Row, claim: Claim) -> bool:
        """Return whether the list of all rows has a claim."""
        kept = {one.row: one.but for one in self.unlisted.claims}
        return row.name not in self.unlisted.rows and claim.says in kept.get(row.name, [claim.says])


def read_questions(path: Path = CLONE / FOLDER / ".." / FILE) -> Asked:
    """Read the questions, and what the list leaves out.

    Raises:
        InputError: If a setting is unknown, missing or wrong.
    """
    asked: Asked = checked(Asked, load_yaml(str(path)), f"{FILE}: ")
    return asked


def answers_page(
    questions: Sequence[Question], rows: Sequence[Row], judged: Mapping[str, Sequence[Verdict]], total: str
) -> str:
    """Return the page as Markdown, with ``total``, the counts of all verdicts."""
    header = ("question", "answer here", "difference", "the paper's", "second world", "interval covers", "what to do")
    lines = [header, ("---",) * len(header)]
    for question in questions:
        row, claim, verdict = find(question.claim, [one for one in rows if one.name == question.row], judged)
        there = [one for one in rows if (one.name == question.second if question.second else one.like == row.name)]
        second = answer(*find(question.second_claim or question.claim, there, judged)) if there else NOTHING
        covers = {True: "training, pairs, captions", False: "training alone"}[verdict.whole]
        number = with_interval(verdict.difference, "{:+.3f}".format) if verdict.word != "not measured" else NOTHING
        cells = (f"**{answer(row, claim, verdict)}**", number, question.paper, second, covers, question.advice)
        lines.append((f"{question.asks} (`{row.name}`)", *cells))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return TEXT.replace("<table>", table).replace("<total>", total)


def find(says: str, rows: Sequence[Row], judged: Mapping[str, Sequence[Verdict]]) -> tuple[Row, Claim, Verdict]:
    """Find the claim that says so.

    Raises:
        InputError: If the rows have no such claim.
    """
    for row in rows:
        for claim, verdict in zip(row.claims, judged[row.name], strict=True):
            if claim.says == says:
                return row, claim, verdict
    raise InputError(f"{FILE}: no claim {says!r} in {', '.join(row.name for row in rows)}; correct the question")


def answer(row: Row, claim: Claim, verdict: Verdict) -> str:
    """Say a verdict in a word or two."""
    margin = row.metrics[claim.higher.metric].margin
    words = {"holds": "yes", "does not hold": "no", "no difference": f"equal within {margin.size:g}" if margin else ""}
    if verdict.word == "open" and verdict.leans:
        return "leans yes" if verdict.leans > 0 else "leans no"
    return words[verdict.word] + " (weak)" * (not verdict.survives) if verdict.word in words else "unknown"


def answers_figure(
    questions: Sequence[Question], rows: Sequence[Row], judged: Mapping[str, Sequence[Verdict]]
) -> Figure | None:
    """Draw each claim's difference and interval in units of the margin δ; None if nothing is measured."""
    by_name = {row.name: row for row in rows}
    found = [(question, *find(question.claim, [by_name[question.row]], judged)) for question in questions]
    found = [one for one in found if one[-1].word != "not measured"]
    if not found:
        return None
    figure = Figure(figsize=(8, 0.9 + 0.3 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(-1, 1, color="#eeeeee", zorder=0)
    axes.axvline(0, color="black", linewidth=0.8)
    for place, (_, row, claim, verdict) in enumerate(found):
        margin = row.metrics[claim.higher.metric].margin
        assert margin is not None, "checked when the row was read"
        colour = COLOURS[answer(row, claim, verdict).split()[0]]
        for one, width in ((verdict.over_seeds, 1), (verdict.difference, 3)):
            ends = [(end - claim.more_than) / margin.size for end in (one.low, one.high)]
            axes.plot(ends, [place] * 2, color=colour, linewidth=width)
        axes.plot((verdict.difference.value - claim.more_than) / margin.size, place, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(found)), [question.asks for question, *_ in found], fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=2)
    axes.set_xlabel("difference in units of δ (grey: does not matter); thick: seeds and items, thin: seeds", fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure
