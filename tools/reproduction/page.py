"""List of all rows with their verdicts, and the page of answers, written from the committed results."""

from collections.abc import Mapping, Sequence
from math import fsum  # the same digits in every Python; from 3.12 on `sum` rounds otherwise
from pathlib import Path
from typing import get_args

import numpy as np
from matplotlib import rc_context

from latentreward.core.reports.tables import NOTHING, Table, as_text, interval, markdown_table, plain, with_interval
from latentreward.core.storage.durable import write_file
from tools.reproduction.answers import PLOT, Asked, answers_figure, answers_page, read_questions
from tools.reproduction.results import Result, judge_claim, read_results
from tools.reproduction.rows import LEAST_SEEDS, MARGINS, MOST_SEEDS, WHOLE, Claim, Paper, Row
from tools.reproduction.verdicts import FARTHEST, FIRST_LEVEL, LEVELS, ONCE_LEVEL, RATE, Verdict, Word, with_discoveries
from tools.reproduction.written import LATE, Commits, compared, in_full, update_commits

INTRODUCTION = Path(__file__).with_name("introduction.md").read_text(encoding="utf-8")
SIGNED = "{:+.3f}".format
SINGLE = " (single)"
"""Mark of a verdict that does not survive the false discovery rate."""
Found = Mapping[str, Mapping[int, Result]]
"""Name of a row → seed → result."""


def status_table(rows: Sequence[Row], output: Path) -> str:
    """Describe in a table for the terminal which rows are measured, and which with other source files than now."""
    lines = []
    for row in rows:
        results = read_results(output, row)
        stale = sorted({result.commit or "unknown" for result in results.values() if result.stale})
        note = f"source has changed since {', '.join(stale)}; --stale measures again" if stale else ""
        of = max(row.seeds, len(results))
        lines.append((row.name, f"{len(results)} of {of}", f"{row.cpu_seconds:.0f}", note))
    return as_text(Table(("row", "seeds measured", "expected CPU s, without shared steps", ""), tuple(lines)))


def write_page(path: Path, rows: Sequence[Row], output: Path) -> None:
    """Write the page of answers with its plot in the folder ``images`` beside it, and the list of all rows.

    The list is ``README.md`` in the folder of the results.
    """
    found = {row.name: read_results(output, row) for row in rows}
    judged, asked = judge_rows(rows, found), read_questions()
    commits = update_commits(output, rows, found)
    write_file(output / "README.md", all_rows_listed(rows, found, judged, commits, asked))
    write_file(path, answers_page(asked.questions, rows, judged, counted(judged, found)))
    if figure := answers_figure(asked.questions, rows, judged):
        with rc_context({"svg.hashsalt": "latentreward"}):
            (path.parent / "images").mkdir(exist_ok=True)
            figure.savefig(path.parent / "images" / PLOT, metadata={"Date": None}, bbox_inches="tight")


def judge_rows(rows: Sequence[Row], found: Found) -> dict[str, list[Verdict]]:
    """Judge the claims of rows, with the false discovery rate over each paper's section: name → verdicts."""
    judged = {row.name: [judge_claim(claim, found[row.name], row) for claim in row.claims] for row in rows}
    for paper in get_args(Paper):
        names = [row.name for row in rows if row.paper == paper]
        marked = iter(with_discoveries([verdict for name in names for verdict in judged[name]]))
        judged |= {name: [next(marked) for _ in judged[name]] for name in names}
    return judged


def all_rows_listed(
    rows: Sequence[Row], found: Found, judged: Mapping[str, Sequence[Verdict]], commits: Commits, asked: Asked
) -> str:
    """Return the list of rows as Markdown; equal rows and results give equal text.

    ``judged`` are the verdicts of :func:`judge_rows`, and ``commits`` those in which the claims were written.
    """
    parts = ["# All rows", introduction(), counted(judged, found)]
    for paper in get_args(Paper):
        of_paper = [row for row in rows if row.paper == paper and row.name not in asked.unlisted.rows]
        parts += [f"## {paper}"] * bool(of_paper)
        for row in of_paper:
            written = commits.get(row.name, {})
            shown = [pair for pair in zip(row.claims, judged[row.name], strict=True) if asked.lists(row, pair[0])]
            parts += _row(row, found[row.name], shown, written)
    return "\n\n".join(parts) + "\n"


def counted(judged: Mapping[str, Sequence[Verdict]], found: Found) -> str:
    """Count all verdicts by word, and the processor time of all results."""
    verdicts = [verdict for one in judged.values() for verdict in one]
    words = [verdict.word for verdict in verdicts]
    counts = ", ".join(f"{words.count(word)} {word}" for word in get_args(Word))
    single = sum(not one.survives and one.word not in ("open", "not measured") for one in verdicts)
    seconds = {key: spent for results in found.values() for one in results.values() for key, spent in one.tasks.items()}
    hours = fsum(seconds.values()) / 3600
    return (
        f"**{len(words)} claims: {counts}.** {single} of the verdicts are single ones. Processor time of all results: "
        f"{hours:.1f} hours."
    )


def introduction() -> str:
    """Return the page's introduction, with the levels, margins and numbers that the verdicts have."""
    margins = "\n".join(f"- {one.of}: {one.size:g}, {one.why}." for one in MARGINS.values())
    numbers = {
        "first look": f"{1 - FIRST_LEVEL:.0%}",
        "once": f"{1 - ONCE_LEVEL:.0%}",
        "first level": f"{1 - LEVELS[0]:.2%}",
        "last level": f"{1 - LEVELS[-1]:.2%}",
        "rate": f"{RATE:.0%}",
        "least": str(LEAST_SEEDS),
        "most": str(MOST_SEEDS),
        "margins": margins,
    }
    text = INTRODUCTION.rstrip()
    for name, number in numbers.items():
        text = text.replace(f"<{name}>", number.replace("%", " %"))
    return text


def _row(
    row: Row, results: Mapping[int, Result], shown: Sequence[tuple[Claim, Verdict]], commits: Mapping[str, str]
) -> list[str]:
    fields = {"Claim": row.claim, "Run": row.run, "Result": row.result}
    described = "\n".join(f"- **{name}**: {text}" for name, text in fields.items() if text)
    parts = [f"### {plain(row.title)}", f"Row `{row.name}`:", described]
    if row.miniature_of:
        parts.append("At full size: " + ", ".join(f"`{name}`" for name in row.miniature_of) + ".")
    texts = [commits.get(in_full(claim), "") for claim, _ in shown]
    names = dict.fromkeys(f"`{text.removesuffix(LATE)}`" for text in texts if text)
    written = f"Claims written at commit {', '.join(names)}. " if names else ""
    if not results:
        expected = f"Not measured yet; expected processor time {row.cpu_seconds:.0f} s without shared steps."
        return [*parts, written + expected]
    if shown:
        header = ("claim", "compared", "difference [seeds and items]", "[seeds]", "verdict")
        lines = [
            (claim.says, compared(claim), *_numbers(verdict), _word(claim, row, verdict) + _late(text))
            for (claim, verdict), text in zip(shown, texts, strict=True)
        ]
        parts.append(markdown_table(Table(header, tuple(lines))))
    seconds = {key: spent for one in results.values() for key, spent in one.tasks.items()}
    parts.append(markdown_table(_means(row, results, seconds)))
    first = next(iter(results.values()))
    measured = ", ".join(dict.fromkeys(f"`{one.commit or 'unknown'}`" for one in results.values()))
    counts = dict.fromkeys(packed["number"] for packed in next(iter(first.measured.values())).values())
    parts.append(
        f"{_seeds(results, [verdict for _, verdict in shown])}, {', '.join(map(str, counts))} held-out items. {written}"
        f"Measured at commit {measured}, {fsum(seconds.values()):.0f} s of processor time, steps shared with other "
        "rows included."
    )
    return parts


def _seeds(results: Mapping[int, Result], verdicts: Sequence[Verdict]) -> str:
    """Say how many seeds there are, and what the intervals over them cover."""
    shared = sum(seed < WHOLE for seed in results)
    numbers = [f"{shared} seeds with the same training pairs"] * (shared > 0)
    numbers += [f"{len(results) - shared} whole repetitions"] * (len(results) > shared)
    words = {one.whole for one in verdicts if one.word != "not measured"}
    covered = {True: "; the intervals cover whole repetitions", False: "; the intervals cover training alone"}
    return " and ".join(numbers) + "".join(covered[word] for word in words)


def _means(row: Row, results: Mapping[int, Result], seconds: Mapping[str, float]) -> Table:
    """Tabulate the metrics of each arm and, where the row names rewards, the processor time of their training."""
    header = ("mean ± sd over seeds", *row.metrics, *(["training of rewards, s"] if row.rewards else []))
    lines = []
    for arm in row.arms:
        cells = [arm]
        for metric in row.metrics:
            means = [result.measured[arm][metric]["mean"] for result in results.values()]
            spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.3f}{spread}")
        if row.rewards:  # the mean over measured seeds
            keys = [{key[:16] for key in row.reward_tasks(arm, seed)} for seed in results]
            sums = [fsum(seconds[key] for key in one) for one in keys if one <= seconds.keys()]
            cells.append(f"{np.mean(sums):.0f}" if any(sums) else NOTHING)
        lines.append(tuple(cells))
    return Table(header, tuple(lines))


def _numbers(verdict: Verdict) -> tuple[str, str]:
    """Format the difference with the interval over seeds and items, and the interval over seeds."""
    if verdict.word == "not measured":
        return NOTHING, NOTHING
    return with_interval(verdict.difference, SIGNED), interval(verdict.over_seeds._replace(groups=None), SIGNED)


def _late(commit: str) -> str:
    """Return the mark of a late claim, or nothing, for what is kept of its commit."""
    return " (late)" * commit.endswith(LATE)


def _word(claim: Claim, row: Row, verdict: Verdict) -> str:
    """Format a verdict, with the margin where it matters, and with what would decide an open claim."""
    if verdict.word == "not measured":
        return verdict.word
    if verdict.word == "open":
        if row.once:
            return "open; it is judged once"
        if verdict.needed is None:
            return f"open; more than {FARTHEST} repetitions, or more items"
        beyond = verdict.counts + verdict.needed > MOST_SEEDS
        return f"open; {verdict.needed} more repetitions{f', beyond the most of {MOST_SEEDS}' * beyond}"
    margin = row.metrics[claim.higher.metric].margin
    size = f"{margin.size:g}" if margin else ""
    text = f"{verdict.word}{f', by less than {size}' * verdict.slight}"
    if verdict.word == "no difference":
        text = f"no difference larger than {size}"
    return text + SINGLE * (not verdict.survives)
