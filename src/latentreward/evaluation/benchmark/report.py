"""Writer of a benchmark report as JSON, Markdown and HTML."""

import platform
from importlib.metadata import version
from pathlib import Path

from latentreward import __version__
from latentreward.evaluation.benchmark.page import Pictures, write_benchmark_page
from latentreward.evaluation.benchmark.results import BenchmarkReport, Disagreement
from latentreward.evaluation.benchmark.sections import INTRODUCTION, disagreement_section, preferred, sections
from latentreward.reports.json import json_report
from latentreward.reports.markdown import markdown_report
from latentreward.reports.tables import Section, Table
from latentreward.storage.durable import write_file

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
COMPUTED_WITH = ("torch", "diffusers", "transformers", "numpy", "pillow")


def write_report(folder: Path, report: BenchmarkReport, pictures: Pictures) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``; each file is replaced only by a complete new one.

    The files hold no date, time or path of the machine, so equal results give equal files.
    """
    write_file(folder / JSON, json_report(report))
    write_file(folder / MARKDOWN, markdown(report))
    write_benchmark_page(folder / HTML, report, pictures)


def markdown(report: BenchmarkReport) -> str:
    """Return the report as Markdown, with the pairs of ``report.telling`` but without images; all text is escaped."""
    title, text, by_data = disagreement_section(report)
    tables = tuple(_disagreement_table(name, pairs, list(report.scorers)) for name, pairs in by_data.items())
    telling = [Section("telling", title, text, tables)] if tables else []
    return markdown_report("Benchmark of reward models", report.notes, INTRODUCTION, [*sections(report), *telling])


def _disagreement_table(name: str, pairs: list[Disagreement], scorers: list[str]) -> Table:
    rows = [
        (
            pair.pair_id,
            pair.prompt if len(pair.prompt) <= 120 else f"{pair.prompt[:119]}…",
            preferred(pair.label),
            *(f"{pair.gaps[scorer]:+.2f}" if scorer in pair.gaps else "" for scorer in scorers),
        )
        for pair in pairs
    ]
    return Table(("pair", "prompt", "people", *(f"gap of {name}" for name in scorers)), tuple(rows), caption=name)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on."""
    ours = {"python": platform.python_version(), "latentreward": __version__}  # which also runs without an installation
    return ours | {name: version(name) for name in COMPUTED_WITH}
