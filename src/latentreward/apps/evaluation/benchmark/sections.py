"""Sections of the report: for each kind of result its heading, an explanation of the numbers, and a table."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from latentreward.apps.evaluation.benchmark.base import BenchmarkReport
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS
from latentreward.apps.evaluation.results import result_table
from latentreward.core.reports.tables import Row, Section, Table, grouped, without_unset

TITLE = "Benchmark of reward models"
TEXTS: Mapping[str, str] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
INTRODUCTION = TEXTS["introduction"]
KINDS = {
    "protocols": "Results",
    "averages": "Mean of four benchmarks",
    "published": "Published by others",
    "differences": "Differences between models",
    "levels": "Accuracy by noise level",
    "calibration": "Calibration",
    "agreement": "Agreement between models",
    "subgroups": "Sub-groups",
}
"""List of results in :class:`BenchmarkReport` → heading of its section, whose text has that name."""
HEADINGS: Mapping[str, Mapping[str, str]] = {
    "averages": {"estimate": "mean accuracy %"},
    "differences": {"estimate": "difference in points"},
    "agreement": {"second": "model"},
}
"""List of results → headings of columns that other lists call otherwise."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is too pale on white."""
MARKERS = "osD^vPX"


def sections(report: BenchmarkReport) -> Iterator[Section]:
    """Yield all sections that are not empty, in the order of the report."""
    for name, title in KINDS.items():
        if rows := getattr(report, name):
            figures = grouped(rows, "benchmark", "protocol").values() if name == "levels" else ()
            table = result_table(rows, theirs=name == "published", **HEADINGS.get(name, {}))
            yield Section(title, TEXTS[name], [table], [*map(level_figure, figures)])
    keys = dict.fromkeys(row["protocol"] for row in report.protocols)
    rules = Table(("protocol", "rule"), tuple((key, PROTOCOLS[key].summary) for key in keys))
    models = tuple((name, without_unset(identity)) for name, identity in report.scorers.items())
    settings = tuple((name, str(value)) for name, value in report.settings.items())
    counts = [{"benchmark": name, **counts} for name, counts in report.data.items()]
    yield Section("Protocols", TEXTS["rules"], [rules])
    yield Section("Data", TEXTS["scored"], [result_table(counts)] if counts else [])
    yield Section("Models", TEXTS["models"], [Table(("model", "what it is"), models)])
    yield Section("Settings and versions", TEXTS["settings"], [Table(("setting", "value"), settings)])


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
    return textwrap.shorten(text, 60, placeholder="…").replace("$", r"\$")
