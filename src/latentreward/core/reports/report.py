"""Writer of a report as JSON, Markdown and HTML."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentreward import __version__
from latentreward.core.reports.drawing import figure_uri
from latentreward.core.reports.page import write_page
from latentreward.core.reports.tables import Section, markdown_table, plain
from latentreward.core.storage.durable import write_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
DIGITS = 10
"""Number of significant digits to which numbers in JSON are rounded."""
COMPUTED_WITH = ("torch", "diffusers", "transformers", "numpy", "pillow")


def write_report(
    folder: Path,
    report: "DataclassInstance",
    title: str,
    introduction: str,
    sections: Sequence[Section],
    template: str = "report",
    **values: Any,
) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``; each file is replaced only by a complete new one.

    The files hold no date, time or path of the machine, so equal results give equal files.

    Args:
        folder: Folder of the files.
        report: Results; JSON gets an entry for each field. The field ``notes`` is shown before all numbers.
        title: Title.
        introduction: Explanation of all numbers.
        sections: Sections in their order.
        template: Template of the HTML page, ``report`` or one that extends it.
        values: Further values of the template.
    """
    notes: Sequence[str] = vars(report)["notes"]
    content = json.dumps(plain_values(vars(report)), indent=1, ensure_ascii=True, allow_nan=False)
    write_file(folder / JSON, content + "\n")
    # Introduction and texts of sections are Markdown and are not escaped; titles and tables are.
    parts = [f"# {plain(title)}", *(f"> **{plain(note)}**" for note in notes), introduction]
    for section in sections:
        parts += [f"## {plain(section.title)}", section.text, *map(markdown_table, section.tables)]
    write_file(folder / MARKDOWN, "\n\n".join(filter(None, parts)) + "\n")
    figures = [[{"uri": figure_uri(figure), "alt": alt} for figure, alt in section.figures] for section in sections]
    values |= {"title": title, "introduction": introduction, "notes": notes, "sections": sections, "figures": figures}
    write_page(folder / HTML, template, **values)


def plain_values(value: Any) -> Any:
    """Convert ``value`` to types of JSON; NaN and infinity become None.

    Other floats are rounded to ``DIGITS`` significant digits.
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on."""
    ours = {"python": platform.python_version(), "latentreward": __version__}  # which also runs without an installation
    return ours | {name: version(name) for name in COMPUTED_WITH}
