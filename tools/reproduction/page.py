"""Page of all rows with their verdicts, written from the committed results, and its plots."""

from collections.abc import Mapping, Sequence
from math import fsum  # the same digits in every Python; from 3.12 on `sum` rounds otherwise
from pathlib import Path
from typing import get_args

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from latentreward.reports.tables import NOTHING, Table, as_text, interval, markdown_table, plain
from latentreward.storage.durable import write_file
from tools.reproduction.results import Result, Verdict, judge_claim, read_results
from tools.reproduction.rows import Claim, Paper, Row

INTRODUCTION = Path(__file__).with_name("introduction.md").read_text(encoding="utf-8")
SIGNED = "{:+.3f}".format
COLOURS = {"holds": "#009E73", "does not hold": "#D55E00", "undecided": "#767676"}


def status_table(rows: Sequence[Row], output: Path) -> str:
    """Describe in a table for the terminal which rows are measured, and which with other source files than now."""
    lines = []
    for row in rows:
        results = read_results(output, row)
        stale = sorted({result.commit or "unknown" for result in results.values() if result.stale})
        note = f"source has changed since {', '.join(stale)}; --stale measures again" if stale else ""
        lines.append((row.name, f"{len(results)} of {row.seeds}", f"{row.cpu_seconds:.0f}", note))
    return as_text(Table(("row", "seeds measured", "expected CPU s, without shared steps", ""), tuple(lines)))


def write_page(path: Path, rows: Sequence[Row], output: Path) -> None:
    """Write the page, and its plots into the folder ``images`` beside it."""
    found = {row.name: list(read_results(output, row).values()) for row in rows}
    write_file(path, page(rows, found))
    for paper in get_args(Paper):
        if figure := claims_figure([row for row in rows if row.paper == paper], found):
            with rc_context({"svg.hashsalt": "latentreward"}):
                (path.parent / "images").mkdir(exist_ok=True)
                figure.savefig(path.parent / "images" / plot_name(paper), metadata={"Date": None}, bbox_inches="tight")


def plot_name(paper: str) -> str:
    """Return the file name of a paper's plot."""
    return f"reproduction_{paper.lower().replace('-', '_').replace(' ', '_')}.svg"


def page(rows: Sequence[Row], found: Mapping[str, Sequence[Result]]) -> str:
    """Return the page as Markdown; equal rows and results give equal text.

    ``found`` holds the results of a row's seeds, by name of the row.
    """
    judged = {row.name: [judge_claim(claim, found[row.name], row) for claim in row.claims] for row in rows}
    words = [verdict.word for verdicts in judged.values() for verdict in verdicts]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys([*COLOURS, "not measured"]))
    seconds = {key: spent for results in found.values() for one in results for key, spent in one.tasks.items()}
    spent = f"Processor time of all results: {fsum(seconds.values()) / 3600:.1f} hours."
    parts = ["# Claims in miniature", INTRODUCTION.rstrip(), f"**{len(words)} claims: {counts}.** {spent}"]
    for paper in get_args(Paper):
        of_paper = [row for row in rows if row.paper == paper]
        if not of_paper:
            continue
        parts.append(f"## {paper}")
        if any(row.claims and len(found[row.name]) > 1 for row in of_paper):
            text = "difference of each claim with its interval over seeds"
            parts.append(f"![{paper}: {text}; the tables below have all numbers](images/{plot_name(paper)})")
        parts += [part for row in of_paper for part in _row(row, found[row.name], judged[row.name])]
    return "\n\n".join(parts) + "\n"


def _row(row: Row, results: Sequence[Result], verdicts: Sequence[Verdict]) -> list[str]:
    texts = {"Claim": row.claim, "Run": row.run, "Result": row.result}
    described = "\n".join(f"- **{name}**: {text}" for name, text in texts.items() if text)
    parts = [f"### {plain(row.title)}", f"Row `{row.name}`:", described]
    if row.miniature_of:
        parts.append("At full size: " + ", ".join(f"`{name}`" for name in row.miniature_of) + ".")
    if not results:
        return [*parts, f"Not measured yet; expected processor time {row.cpu_seconds:.0f} s without shared steps."]
    if row.claims:
        header = ("claim", "compared", "difference [95 %]", "95 % over seeds", "verdict")
        parts.append(markdown_table(Table(header, tuple(map(_claim, row.claims, verdicts)))))
    seconds = {key: spent for one in results for key, spent in one.tasks.items()}
    parts.append(markdown_table(_means(row, results, seconds)))
    commits = ", ".join(dict.fromkeys(f"`{one.commit or 'unknown'}`" for one in results))
    items = ", ".join(
        str(count)
        for count in dict.fromkeys(packed["number"] for packed in next(iter(results[0].measured.values())).values())
    )
    parts.append(
        f"{len(results)} of {row.seeds} seeds, {items} held-out items, commit {commits}, {fsum(seconds.values()):.0f} "
        "s of processor time, steps shared with other rows included."
    )
    return parts


def _means(row: Row, results: Sequence[Result], seconds: Mapping[str, float]) -> Table:
    """Tabulate the metrics of each arm and, where the row names rewards, the processor time of their training."""
    header = ("mean ± sd over seeds", *row.metrics, *(["training of rewards, s"] if row.rewards else []))
    lines = []
    for arm in row.arms:
        cells = [arm]
        for metric in row.metrics:
            means = [result.measured[arm][metric]["mean"] for result in results]
            spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.3f}{spread}")
        if row.rewards:  # the mean over measured seeds
            keys = [{key[:16] for key in row.reward_tasks(arm, seed)} for seed in range(row.seeds)]
            sums = [fsum(seconds[key] for key in one) for one in keys if one <= seconds.keys()]
            cells.append(f"{np.mean(sums):.0f}" if any(sums) else NOTHING)
        lines.append(tuple(cells))
    return Table(header, tuple(lines))


def _claim(claim: Claim, verdict: Verdict) -> tuple[str, ...]:
    higher, lower = claim.higher, claim.lower
    sides = [f"{higher.arm} ({higher.metric})"]
    if lower is not None:
        sides.append(lower.arm if lower.metric == higher.metric else f"{lower.arm} ({lower.metric})")
    compared = " > ".join(sides) + (f" by more than {claim.more_than:g}" if claim.more_than else "")
    if verdict.word == "not measured":
        return claim.says, compared, NOTHING, NOTHING, verdict.word
    difference = f"{verdict.difference.value:+.3f} {interval(verdict.difference, SIGNED)}"
    return claim.says, compared, difference, interval(verdict.over_seeds._replace(groups=None), SIGNED), verdict.word


def claims_figure(rows: Sequence[Row], found: Mapping[str, Sequence[Result]]) -> Figure | None:
    """Draw the difference of each claim minus what it should exceed, with both intervals; None without any."""
    judged = [(claim, judge_claim(claim, found[row.name], row)) for row in rows for claim in row.claims]
    drawn = [(claim, verdict) for claim, verdict in judged if verdict.word != "not measured"]
    if not drawn:
        return None
    figure = Figure(figsize=(7.5, 0.9 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    for place, (claim, verdict) in enumerate(drawn):
        colour = COLOURS[verdict.word]
        for one, width in ((verdict.over_seeds, 1), (verdict.difference, 3)):
            axes.plot(
                [one.low - claim.more_than, one.high - claim.more_than], [place] * 2, color=colour, linewidth=width
            )
        axes.plot(verdict.difference.value - claim.more_than, place, "o", color=colour, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(drawn)), [claim.says for claim, _ in drawn], fontsize=8)
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlabel(
        "difference (right: the claim's side); thick: seeds and items resampled, thin: Student's t over seeds"
    )
    axes.xaxis.label.set_fontsize(8)
    axes.set_xscale("symlog", linthresh=0.05)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure
