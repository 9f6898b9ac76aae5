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
from tools.reproduction.rows import Claim, Paper, Row, Side

INTRODUCTION = """\
`latentreward reproduce` writes this page from the files in `reproduction/`; do not edit it by hand. `make reproduce`
measures what is missing.

Each row repeats a claim or an ablation of a paper in miniature: on a CPU, with the shipped tiny generators, drawn
pictures and noisy labels. A row is one file of `configs/reproduce/`, which holds the arguments of its arms. A claim
that holds in miniature may not hold at full size, and the reverse. The section on later methods compares them on equal
terms, which their papers do not; the rows named `tuning_…` chose its learning rates, on captions that no other row
measures.

- **Verdict**: a claim *holds* if two 95 % intervals of the difference lie wholly on its side, *does not hold* if both
  lie wholly on the other side, and is *undecided* otherwise.
- The first interval resamples seeds and held-out items independently (crossed bootstrap). The second is Student's t
  over seeds, which includes the variation between trainings.
- **Accuracy** is the share of pairs ranked as the noiseless utility (0 to 6) ranks them, among pairs whose utilities
  differ by more than 0.3. "Ranked as alignment" and "ranked as quality" take one part of the utility, among pairs that
  differ in it; they stand for the papers' correlations with CLIP and aesthetic scores.
- Utility, alignment and quality of sampled pictures are measured by the tiny world's judge, which is never a reward.
"""
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
    parts = ["# Claims in miniature", INTRODUCTION.rstrip(), _summary(words, found)]
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


def _summary(words: Sequence[str], found: Mapping[str, Sequence[Result]]) -> str:
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys([*COLOURS, "not measured"]))
    seconds = {key: spent for results in found.values() for one in results for key, spent in one.tasks.items()}
    return (
        f"**{len(words)} claims: {counts}.** Processor time of all results: {fsum(seconds.values()) / 3600:.1f} hours."
    )


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
        cells = [arm, *(_cell(results, Side(arm, metric)) for metric in row.metrics)]
        lines.append((*cells, *([_reward_seconds(row, arm, seconds)] if row.rewards else [])))
    return Table(header, tuple(lines))


def _claim(claim: Claim, verdict: Verdict) -> tuple[str, ...]:
    sides = [_side(claim.higher), *([_side(claim.lower, claim.higher)] if claim.lower else [])]
    compared = " > ".join(sides) + (f" by more than {claim.more_than:g}" if claim.more_than else "")
    if verdict.word == "not measured":
        return claim.says, compared, NOTHING, NOTHING, verdict.word
    difference = f"{verdict.difference.value:+.3f} {interval(verdict.difference, SIGNED)}"
    return claim.says, compared, difference, interval(verdict.over_seeds._replace(groups=None), SIGNED), verdict.word


def _side(side: Side, other: Side | None = None) -> str:
    return side.arm if other is not None and other.metric == side.metric else f"{side.arm} ({side.metric})"


def _cell(results: Sequence[Result], side: Side) -> str:
    means = [result.measured[side.arm][side.metric]["mean"] for result in results]
    spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
    return f"{np.mean(means):.3f}{spread}"


def _reward_seconds(row: Row, arm: str, seconds: Mapping[str, float]) -> str:
    """Return the mean over measured seeds of the processor time that an arm's rewards took."""
    keys = [{key[:16] for key in row.reward_tasks(arm, seed)} for seed in range(row.seeds)]
    sums = [fsum(seconds[key] for key in one) for one in keys if one <= seconds.keys()]
    return f"{np.mean(sums):.0f}" if any(sums) else NOTHING


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
