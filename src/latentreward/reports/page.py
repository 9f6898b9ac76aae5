"""Templates to self-contained HTML; every text that is put in is escaped."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from jinja2.meta import find_referenced_templates
from markupsafe import Markup

from latentreward.storage.durable import write_file

POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; "
    "img-src data:; style-src 'unsafe-inline'; script-src {scripts}"
)
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def environment(loader: BaseLoader) -> Environment:
    """How templates are read: everything put in is escaped, and nothing may be left out."""
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


_environment = environment(PackageLoader("latentreward.reports"))


def render_page(template: str, **values: Any) -> str:
    """A page from ``templates/NAME.html.j2``.

    A content security policy in the page allows pictures that it holds itself and the scripts that its template spells
    out, by their hashes, and nothing else: a text that got into the markup could still not run. So a script takes its
    values from attributes or from a block of JSON, and is the same on every page.

    Args:
        template: Name of the template without its endings; it extends ``base.html.j2``.
        values: What the template shows.
    """
    name = f"{template}.html.j2"
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _scripts(name))
    scripts = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = POLICY.format(scripts=scripts)
    return _environment.get_template(name).render(**values, policy=Markup(policy))


def _scripts(name: str) -> list[str]:
    """Scripts in the source of a template and of those it extends or includes."""
    assert _environment.loader is not None
    source, _, _ = _environment.loader.get_source(_environment, name)
    others = find_referenced_templates(_environment.parse(source))
    return [*SCRIPT.findall(source), *(script for other in others if other for script in _scripts(other))]


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write :func:`render_page`; a page that is there already is replaced whole or not at all."""
    write_file(path, render_page(template, **values))
