"""Sections of the report: for each kind of result its heading, an explanation of the numbers, tables and a figure."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from latentreward.apps.evaluation.benchmark.base import AVERAGE, BenchmarkReport
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS
from latentreward.apps.evaluation.benchmark.telling import Pictures, card, preferred, shortened
from latentreward.apps.evaluation.results import result_table
from latentreward.core.reports.tables import NOTHING, Column, Row, Section, Table, cell, grouped, without_unset

LARGEST = 25
"""Most rows of a table of sub-groups."""
OURS = "Measured in this run"
TITLE = "Benchmark of reward models"
TEXTS: Mapping[str, str] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
INTRODUCTION = TEXTS["introduction"]
PUBLISHED = f" {TEXTS['published']}"
"""Text after that of a section with published numbers."""


KINDS = {
    "differences": "Differences between models",
    "levels": "Accuracy by noise level",
    "calibration": "Calibration",
    "agreement": "Agreement between models",
    "correlations": "CLIP-Corr and Aes-Corr",
}
"""List of results in :class:`BenchmarkReport` → heading of its section, whose text has that name."""
HEADINGS = {"differences": {"estimate": "difference in points"}, "agreement": {"second": "model"}}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is too pale on white."""
MARKERS = "osD^vPX"


def level_figure(results: Sequence[Row]) -> tuple[Figure, str]:
    """Draw accuracy over the noise level by one protocol on one data set; return the figure with a text for it."""
    benchmark = results[0]["benchmark"]
    figure = Figure(figsize=(6.4, 3.6), facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for number, ((scorer,), unsorted) in enumerate(grouped(results, "scorer").items()):
        rows = sorted(unsorted, key=lambda row: row["sigma"])
        sigmas = [row["sigma"] for row in rows]
        values, lows, highs = ([100 * row["estimate"][end] for row in rows] for end in range(3))
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.fill_between(sigmas, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.plot(sigmas, values, label=_label(scorer), color=colour, marker=marker)
    axes.axhline(50, color="#767676", linewidth=0.8, linestyle=":")
    axes.set(title=_label(f"{benchmark}: {results[0]['protocol']}"), xlim=(0, 1))
    axes.set(xlabel="noise level (0 clean, 1 noise)", ylabel="accuracy in %")
    axes.legend(frameon=False)
    return figure, f"Accuracy on {benchmark} over the noise level, with 95 % bands; the table below has all numbers."


def _label(text: str) -> str:
    """Shorten a name, and escape ``$`` so that matplotlib does not read the name as a formula."""
    return shortened(text, 60).replace("$", r"\$")


def sections(report: BenchmarkReport, pictures: Pictures | None = None) -> Iterator[Section]:
    """Yield all sections that are not empty, in the order of the report, with ``pictures`` of ``report.telling``."""
    if len(report.protocols) > 1:
        text = "Accuracy in %, with 95 % intervals. Protocols treat ties differently; each is explained below."
        rows, shown = _side_by_side(report.protocols, "benchmark", "protocol"), map(_of_scorer, report.scorers)
        yield Section("Overview", text, [Table.of(rows, ("data", "benchmark"), ("protocol", "protocol"), *shown)])
    published = grouped(report.published, "protocol")
    if report.averages:
        tables = [result_table(report.averages, OURS, estimate="mean accuracy %"), _published(published[AVERAGE,])]
        yield Section("Mean of four benchmarks", TEXTS["four"] + PUBLISHED, tables)
    for (protocol, benchmark), same in grouped(report.protocols, "protocol", "benchmark").items():
        theirs, summary = published.get((protocol,), []), PROTOCOLS[protocol].summary
        text = f"{summary[0].upper()}{summary[1:]}.{PUBLISHED if theirs else ''}"
        ours = result_table(same, OURS, hidden=("protocol", "benchmark"))
        tables = [ours, *([_published(theirs)] if theirs else [])]
        yield Section(f"{benchmark}: {protocol}", text, tables)
    for name, title in KINDS.items():
        if rows := getattr(report, name):
            figures = grouped(rows, "benchmark", "protocol").values() if name == "levels" else ()
            table = result_table(rows, **HEADINGS.get(name, {}))
            yield Section(title, TEXTS[name], [table], [*map(level_figure, figures)])
    if report.subgroups:
        tables = []
        by_column = grouped(report.subgroups, "benchmark", "protocol", "column")
        for (benchmark, protocol, column), results in by_column.items():
            scorers = map(_of_scorer, dict.fromkeys(result["scorer"] for result in results))
            rows, notes = _side_by_side(results, "value")[:LARGEST], f"{benchmark}: {protocol} by {column}"
            tables.append(Table.of(rows, (column, "value"), ("pairs", "pairs"), *scorers, notes=notes))
        yield Section("Sub-groups", TEXTS["subgroups"], tables)
    models = tuple((name, without_unset(identity)) for name, identity in report.scorers.items())
    settings = tuple((name, str(value)) for name, value in report.settings.items())
    counts = [{"benchmark": name, **counts} for name, counts in report.data.items()]
    yield Section("Data", TEXTS["scored"], [result_table(counts)] if counts else [])
    yield Section("Models", TEXTS["models"], [Table(("model", "what it is"), models)])
    yield Section("Settings and versions", TEXTS["settings"], [Table(("setting", "value"), settings)])
    if report.telling:
        yield _telling(report, pictures or {})


def _published(theirs: Sequence[Row]) -> Table:
    return result_table(theirs, "Published by others", hidden=("protocol",), theirs=True)


def _side_by_side(results: Sequence[Row], *keys: str) -> list[Row]:
    """Merge results that differ in scorer only: ``estimates`` by scorer, and ``pairs`` as in ``98/100``."""
    return [
        {
            **same[0],
            "pairs": "/".join(dict.fromkeys(str(one["pairs"]) for one in same)),
            "estimates": {one["scorer"]: one["estimate"] for one in same},
        }
        for same in grouped(results, *keys).values()
    ]


def _of_scorer(scorer: str) -> Column:
    return scorer, lambda row: cell(row["estimates"][scorer]) if scorer in row["estimates"] else NOTHING


def _telling(report: BenchmarkReport, pictures: Pictures) -> Section:
    several = len(report.scorers) > 1
    title = "Where the models disagree most" if several else "Surest mistakes"
    what = "two models prefer different images" if several else "the model prefers the wrong image"
    columns: tuple[Column, ...] = (
        ("pair", "pair_id"),
        ("prompt", lambda row: shortened(row["prompt"], 120)),
        ("people", lambda row: preferred(row["label"])),
        *(_gap(scorer) for scorer in report.scorers),
    )
    by_data = {name: pairs for (name,), pairs in grouped(report.telling, "benchmark").items()}
    tables = [Table.of(pairs, *columns, notes=name) for name, pairs in by_data.items()]
    cards = {name: [card(pair, pictures) for pair in pairs] for name, pairs in by_data.items()}
    return Section(title, f"Pairs on which {what} by the largest gaps, {TEXTS['telling']}", tables, cards=cards)


def _gap(scorer: str) -> Column:
    return f"gap of {scorer}", lambda row: f"{row['gaps'][scorer]:+.2f}" if scorer in row["gaps"] else ""
