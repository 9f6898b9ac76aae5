"""Rendering of templates to self-contained HTML pages; every inserted text is escaped."""

import base64
import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from jinja2.meta import find_referenced_templates
from markupsafe import Markup

from latentreward import __version__
from latentreward.core.reports.drawing import figure_uri
from latentreward.core.reports.tables import Section, markdown_table, plain
from latentreward.core.storage.durable import write_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; "
    "img-src data:; style-src 'unsafe-inline'; script-src {scripts}"
)
"""Content security policy of pages that are files."""
SERVED_POLICY = POLICY.replace("img-src data:", "connect-src 'self'; img-src 'self' data:")
"""Content security policy of pages that a server of ours on this machine gives out, with its pictures and answers."""
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def environment(loader: BaseLoader) -> Environment:
    """Create a Jinja environment that escapes all inserted values, and raises an error if a value is missing."""
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


_environment = environment(PackageLoader("latentreward.core.reports"))


def render_page(template: str, *, served: bool = False, **values: Any) -> str:
    """Render the template ``templates/NAME.html.j2``, which must extend ``base.html.j2``, to HTML.

    The page's content security policy allows only embedded images, inline styles, and the scripts of the template, by
    the hashes of their constant text, so that injected markup could not run scripts. A page that is ``served`` may
    fetch pictures and answers from its server.
    """
    name = f"{template}.html.j2"
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _scripts(name))
    scripts = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = (SERVED_POLICY if served else POLICY).format(scripts=scripts)
    return _environment.get_template(name).render(**values, policy=Markup(policy))


def _scripts(name: str) -> list[str]:
    """Find the scripts in a template, and in the templates that it extends or includes."""
    assert _environment.loader is not None
    source, _, _ = _environment.loader.get_source(_environment, name)
    others = find_referenced_templates(_environment.parse(source))
    return [*SCRIPT.findall(source), *(script for other in others if other for script in _scripts(other))]


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a page as :func:`render_page` does, and write it to ``path`` atomically."""
    write_file(path, render_page(template, **values))


JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
DIGITS = 10  # Number of significant digits to which numbers in JSON are rounded
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
    """Convert ``value`` to types of JSON; NaN and infinity become None, other floats have ``DIGITS`` digits."""
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
