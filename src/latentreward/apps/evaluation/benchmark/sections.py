"""Sections of the report: for each kind of result its heading, an explanation of the numbers, tables and figures."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from latentreward.apps.evaluation.benchmark import plots
from latentreward.apps.evaluation.benchmark.disagreements import Pictures, disagreement_card, preferred
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS
from latentreward.apps.evaluation.benchmark.published_numbers import AVERAGE
from latentreward.apps.evaluation.benchmark.results import BenchmarkReport
from latentreward.core.reports.tables import (
    NOTHING,
    Column,
    Row,
    Section,
    Table,
    cell,
    grouped,
    interval,
    percent,
    with_interval,
    without_unset,
)

LARGEST = 25
"""Most rows of a table of sub-groups."""
TITLE = "Benchmark of reward models"
TEXTS: Mapping[str, str] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
INTRODUCTION = TEXTS["introduction"]
PUBLISHED = f" {TEXTS['published']}"
"""Text after that of a section with published numbers."""


def temperature(value: float) -> str:
    """Format a temperature with three digits; inf means that larger gaps do not win more often."""
    return f"{value:.3g}" if math.isfinite(value) else "none (larger gaps do not win)"


def _correlation(row: Row, name: str) -> str:
    """Format an interval with two digits after the point, and never as ``-0.00``."""
    return with_interval(row[name], lambda value: NOTHING if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}")


DATA: Column = ("data", "benchmark")
PROTOCOL: Column = ("protocol", "protocol")
MODEL: Column = ("model", "scorer")
ACCURACY: tuple[Column, ...] = (
    ("accuracy %", lambda row: percent(row["estimate"].value)),
    ("95 % interval", lambda row: interval(row["estimate"])),
)


@dataclass(frozen=True)
class Kind:
    """Kind of result with a section of its own."""

    title: str  # heading
    columns: tuple[Column, ...]  # columns of the section's table
    # Function that draws the results of one data set and protocol
    figure: Callable[[Sequence[Row]], plots.Drawn] | None = None


KINDS = {
    "differences": Kind(
        "Differences between models",
        (
            *(DATA, PROTOCOL, ("model", "first"), ("against", "second"), ("pairs", "pairs")),
            ("difference in points", "estimate"),
            ("interval excludes 0", lambda row: "yes" if row["estimate"].low > 0 or row["estimate"].high < 0 else "no"),
        ),
    ),
    "levels": Kind(
        "Accuracy by noise level",
        (DATA, PROTOCOL, MODEL, ("noise level", "sigma"), ("timestep", "timestep"), ("accuracy %", "estimate")),
        plots.level_figure,
    ),
    "calibration": Kind(
        "Calibration",
        (
            *(DATA, PROTOCOL, MODEL),
            ("temperature", lambda row: temperature(row["temperature"])),
            ("calibration error %", "error"),
        ),
        plots.calibration_figure,
    ),
    "agreement": Kind(
        "Agreement between models",
        (
            *(DATA, ("model", "first"), ("model", "second"), ("pairs", "pairs"), ("same choice %", "pair")),
            ("Spearman", partial(_correlation, name="spearman")),
            ("Pearson", partial(_correlation, name="pearson")),
        ),
        plots.agreement_figure,
    ),
    "correlations": Kind(
        "CLIP-Corr and Aes-Corr",
        (DATA, MODEL, ("name", "name"), ("against", "reference"), ("value", partial(_correlation, name="estimate"))),
    ),
}
"""List of results in :class:`BenchmarkReport` → section that shows it, with the text of that name."""


def sections(report: BenchmarkReport, pictures: Pictures | None = None) -> Iterator[Section]:
    """Yield all sections that are not empty, in the order of the report, with ``pictures`` of ``report.telling``."""
    if len(report.protocols) > 1:
        text = "Accuracy in %, with 95 % intervals. Protocols treat ties differently; each is explained below."
        rows = _side_by_side(report.protocols, "benchmark", "protocol")
        yield Section("Overview", text, [Table.of(rows, DATA, PROTOCOL, *map(_of_scorer, report.scorers))])
    published = grouped(report.published, "protocol")
    if report.averages:
        columns = (MODEL, ("mean accuracy %", ACCURACY[0][1]), ACCURACY[1])
        tables = [Table.of(report.averages, *columns, notes="Measured in this run"), _published(published[AVERAGE,])]
        yield Section("Mean of four benchmarks", TEXTS["four"] + PUBLISHED, tables)
    for (protocol, benchmark), rows in grouped(report.protocols, "protocol", "benchmark").items():
        theirs, summary = published.get((protocol,), []), PROTOCOLS[protocol].summary
        text = f"{summary[0].upper()}{summary[1:]}.{PUBLISHED if theirs else ''}"
        tables = [protocol_table(rows), *([_published(theirs)] if theirs else [])]
        known = any(math.isfinite(row["estimate"].value) for row in rows)
        yield Section(f"{benchmark}: {protocol}", text, tables, [plots.accuracy_figure(rows, theirs)] if known else [])
    for name, kind in KINDS.items():
        if rows := getattr(report, name):
            groups = grouped(rows, "benchmark", "protocol").values()
            figures = [kind.figure(same) for same in groups] if kind.figure else []
            yield Section(kind.title, TEXTS[name], [Table.of(rows, *kind.columns)], figures)
    if report.subgroups:
        tables = []
        by_column = grouped(report.subgroups, "benchmark", "protocol", "column")
        for (benchmark, protocol, column), results in by_column.items():
            scorers = map(_of_scorer, dict.fromkeys(result["scorer"] for result in results))
            rows, notes = _side_by_side(results, "value")[:LARGEST], f"{benchmark}: {protocol} by {column}"
            tables.append(Table.of(rows, (column, "value"), ("pairs", "pairs"), *scorers, notes=notes))
        yield Section("Sub-groups", TEXTS["subgroups"], tables)
    counts = Table.of(
        [{"benchmark": name, **counts} for name, counts in report.data.items()],
        DATA,
        ("pairs scored", lambda row: f"{row['pairs']} of {row['pairs_in_file']}"),
        *(("prompts", "prompts"), ("images", "images"), ("unreadable images", "unreadable_images")),
        *(("pairs without image", "pairs_without_an_image"), ("rows left out", "rows_left_out_by_the_reader")),
    )
    models = tuple((name, without_unset(identity)) for name, identity in report.scorers.items())
    settings = tuple((name, str(value)) for name, value in report.settings.items())
    yield Section("Data", TEXTS["scored"], [counts])
    yield Section("Models", TEXTS["models"], [Table(("model", "what it is"), models)])
    yield Section("Settings and versions", TEXTS["settings"], [Table(("setting", "value"), settings)])
    if report.telling:
        yield _telling(report, pictures or {})


def protocol_table(results: Sequence[Row]) -> Table:
    """Build the table of all models by one protocol."""
    return Table.of(
        results,
        *(MODEL, *ACCURACY, ("pairs", "pairs"), ("prompts", "groups"), ("equal scores", "equal_scores")),
        ("pairs left out", "excluded"),
        ("more", lambda row: _details(row["details"])),
        notes="Measured in this run",
    )


def _published(theirs: Sequence[Row]) -> Table:
    accuracy: Column = ("accuracy %", lambda row: percent(row["value"]))
    columns = ("model", "model"), accuracy, ("source", "source")
    return Table.of(theirs, *columns, notes="Published by others", theirs=True)


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
        ("prompt", lambda row: row["prompt"] if len(row["prompt"]) <= 120 else f"{row['prompt'][:119]}…"),
        ("people", lambda row: preferred(row["label"])),
        *(_gap(scorer) for scorer in report.scorers),
    )
    by_data = {name: pairs for (name,), pairs in grouped(report.telling, "benchmark").items()}
    tables = [Table.of(pairs, *columns, notes=name) for name, pairs in by_data.items()]
    cards = {name: [disagreement_card(pair, pictures) for pair in pairs] for name, pairs in by_data.items()}
    return Section(title, f"Pairs on which {what} by the largest gaps, {TEXTS['telling']}", tables, cards=cards)


def _gap(scorer: str) -> Column:
    return f"gap of {scorer}", lambda row: f"{row['gaps'][scorer]:+.2f}" if scorer in row["gaps"] else ""


def _details(details: Row) -> str:
    parts = []
    for name, value in details.items():
        if name == "draws":
            drawn = f"{value['number']} draws of noise"
            spread = f"{percent(value['mean'])} ± {percent(value['sd'])}"
            parts.append(f"{drawn}: {spread}" if value["sd"] else f"the same under {drawn}")
        elif name == "axes":
            parts += [f"{axis} alone {percent(accuracy)}" for axis, accuracy in value.items()]
        elif name == "temperature":
            parts.append(f"temperature {temperature(value)}")
        elif isinstance(value, (str, int)):
            parts.append(f"{name.replace('_', ' ')} {value}")
        elif isinstance(value, float):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    return "; ".join(parts) or NOTHING
