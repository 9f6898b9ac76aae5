"""Tables of a report as text, for Markdown, HTML and the terminal."""

import math
from collections.abc import Sequence
from typing import Any

from latentreward.evaluation.benchmark.results import (
    BenchmarkReport,
    ProtocolResult,
    PublishedNumber,
    SubgroupResult,
)
from latentreward.reports.tables import (
    NOTHING,
    Table,
    grouped,
    interval,
    percent,
    with_interval,
    without_unset,
)

LARGEST = 25
"""Most rows of a table of sub-groups."""


def count_list(counts: dict[str, int]) -> str:
    """Format counts by reason, e.g. ``3 truncated, 1 missing file``; ``0`` if all counts are 0."""
    return ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()) if number) or "0"


def data_table(report: BenchmarkReport) -> Table:
    """Build the table of data sets: what was scored and what was left out."""
    rows = [
        (
            name,
            f"{counts['pairs']} of {counts['pairs_in_file']}",
            str(counts["prompts"]),
            str(counts["images"]),
            count_list(counts["unreadable_images"]),
            str(counts["pairs_without_an_image"]),
            count_list(counts["rows_left_out_by_the_reader"]),
        )
        for name, counts in report.data.items()
    ]
    header = ("data", "pairs scored", "prompts", "images", "unreadable images", "pairs without image", "rows left out")
    return Table(header, tuple(rows))


def scorer_table(report: BenchmarkReport) -> Table:
    """Build the table of models with their identities."""
    rows = tuple((name, without_unset(identity)) for name, identity in report.scorers.items())
    return Table(("model", "what it is"), rows)


def overview_table(report: BenchmarkReport) -> Table:
    """Build the overview: a row per data set and protocol, a column per model."""
    rows = []
    for (benchmark, protocol), results in grouped(report.protocols, "benchmark", "protocol").items():
        found = {result.scorer: with_interval(result.estimate) for result in results}
        rows.append((benchmark, protocol, *(found.get(scorer, NOTHING) for scorer in report.scorers)))
    return Table(("data", "protocol", *report.scorers), tuple(rows))


def average_table(report: BenchmarkReport) -> Table:
    """Build the table of mean accuracies over four benchmarks."""
    rows = tuple((one.scorer, percent(one.estimate.value), interval(one.estimate)) for one in report.averages)
    return Table(("model", "mean accuracy %", "95 % interval"), rows, caption="Measured in this run")


def protocol_table(results: Sequence[ProtocolResult]) -> Table:
    """Build the table of all models by one protocol."""
    rows = [
        (
            result.scorer,
            percent(result.estimate.value),
            interval(result.estimate),
            str(result.pairs),
            str(result.groups),
            str(result.equal_scores),
            count_list(result.excluded),
            _details(result.details),
        )
        for result in results
    ]
    header = ("model", "accuracy %", "95 % interval", "pairs", "prompts", "equal scores", "pairs left out", "more")
    return Table(header, tuple(rows), caption="Measured in this run")


def published_table(published: Sequence[PublishedNumber]) -> Table:
    """Build the table of numbers that others published for one protocol."""
    rows = tuple((one.model, percent(one.value), one.source) for one in published)
    return Table(("model", "accuracy %", "source"), rows, caption="Published by others", theirs=True)


def difference_table(report: BenchmarkReport) -> Table:
    """Build the table of differences between every two models."""
    rows = [
        (
            one.benchmark,
            one.protocol,
            one.first,
            one.second,
            str(one.pairs),
            with_interval(one.estimate),
            "yes" if one.estimate.low > 0 or one.estimate.high < 0 else "no",
        )
        for one in report.differences
    ]
    header = ("data", "protocol", "model", "against", "pairs", "difference in points", "interval excludes 0")
    return Table(header, tuple(rows))


def subgroup_tables(report: BenchmarkReport) -> list[Table]:
    """Build a table for each protocol and column of sub-groups: a row per sub-group, a column per model."""
    tables = []
    for (benchmark, protocol, column), results in grouped(report.subgroups, "benchmark", "protocol", "column").items():
        scorers = list(dict.fromkeys(result.scorer for result in results))
        rows = [_subgroup_row(value, same, scorers) for (value,), same in grouped(results, "value").items()]
        caption = f"{benchmark}: {protocol} by {column}"
        tables.append(Table((column, "pairs", *scorers), tuple(rows[:LARGEST]), caption=caption))
    return tables


def level_table(report: BenchmarkReport) -> Table:
    """Build the table of accuracy by noise level."""
    rows = [
        (
            one.benchmark,
            one.protocol,
            one.scorer,
            f"{one.sigma:g}",
            f"{one.timestep:g}",
            with_interval(one.estimate),
        )
        for one in report.levels
    ]
    return Table(("data", "protocol", "model", "noise level", "timestep", "accuracy %"), tuple(rows))


def calibration_table(report: BenchmarkReport) -> Table:
    """Build the table of calibration errors."""
    rows = [
        (one.benchmark, one.protocol, one.scorer, _temperature(one.temperature), with_interval(one.error))
        for one in report.calibration
    ]
    return Table(("data", "protocol", "model", "temperature", "calibration error %"), tuple(rows))


def agreement_table(report: BenchmarkReport) -> Table:
    """Build the table of agreement between every two models."""
    rows = []
    for one in report.agreement:
        correlations = with_interval(one.spearman, _number), with_interval(one.pearson, _number)
        rows.append((one.benchmark, one.first, one.second, str(one.pairs), with_interval(one.pair), *correlations))
    header = ("data", "model", "model", "pairs", "same choice %", "Spearman", "Pearson")
    return Table(header, tuple(rows))


def correlation_table(report: BenchmarkReport) -> Table:
    """Build the table of CLIP-Corr and Aes-Corr: agreement of rewards with CLIP and aesthetic scorers."""
    rows = [
        (one.benchmark, one.scorer, one.name, one.reference, with_interval(one.estimate, _number))
        for one in report.correlations
    ]
    return Table(("data", "model", "name", "against", "value"), tuple(rows))


def _subgroup_row(value: str, results: Sequence[SubgroupResult], scorers: Sequence[str]) -> tuple[str, ...]:
    found = {result.scorer: with_interval(result.estimate) for result in results}
    pairs = "/".join(dict.fromkeys(str(result.pairs) for result in results))
    return value, pairs, *(found.get(scorer, NOTHING) for scorer in scorers)


def _details(details: dict[str, Any]) -> str:
    parts = []
    for name, value in details.items():
        if name == "draws":
            drawn = f"{value['number']} draws of noise"
            spread = f"{percent(value['mean'])} ± {percent(value['sd'])}"
            parts.append(f"{drawn}: {spread}" if value["sd"] else f"the same under {drawn}")
        elif name == "axes":
            parts += [f"{axis} alone {percent(accuracy)}" for axis, accuracy in value.items()]
        elif name == "temperature":
            parts.append(f"temperature {_temperature(value)}")
        elif isinstance(value, (str, int)):
            parts.append(f"{name.replace('_', ' ')} {value}")
        elif isinstance(value, float):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    return "; ".join(parts) or NOTHING


def _temperature(value: float) -> str:
    """Format a temperature with three digits; inf means that larger gaps do not win more often."""
    return f"{value:.3g}" if math.isfinite(value) else "none (larger gaps do not win)"


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"
