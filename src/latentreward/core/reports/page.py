"""Rendering of templates to self-contained HTML pages; every inserted text is escaped."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from jinja2.meta import find_referenced_templates
from markupsafe import Markup

from latentreward.core.storage.durable import write_file

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
    their hashes. Injected markup could therefore not run scripts. A script in a template must be constant text, for the
    hash; it should read its values from attributes or from a block of JSON. A page that is ``served`` may fetch
    pictures and answers from its server.
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
