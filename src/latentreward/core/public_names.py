"""Public names of the rooms: where each is defined, read from the rooms' stubs without an import of the rooms.

Settings may name a class without its module. jsonargparse finds such a class only once its module is imported, so that
:func:`import_said` imports what settings say, and nothing else.
"""

import ast
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
FACES = ("data", "diffusion", "reward", "alignment", "tinyworld", "apps/generation", "apps/evaluation/benchmark")
"""Folders whose ``__init__.pyi`` lists what they hand out."""


@cache
def public_names() -> dict[str, str]:
    """Return the module that defines each public class and function, by name."""
    places = {f"latentreward.{face.replace('/', '.')}": PACKAGE / face / "__init__.pyi" for face in FACES}
    if found := find_spec("latentreward.callbacks"):
        places["latentreward.callbacks"] = Path(str(found.origin))
    names: dict[str, str] = {}
    for package, file in places.items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                module = f"{package}.{node.module}" if node.level else str(node.module)
                names |= dict.fromkeys((alias.name for alias in node.names), module)
    return names


def import_said(text: str) -> None:
    """Import the public classes whose names stand in ``text``."""
    for name in set(re.findall(r"\b[A-Z]\w+", text)) & public_names().keys():
        import_module(public_names()[name])


def import_all() -> None:
    """Import all public classes, for lists of choices."""
    for module in {*public_names().values()}:
        import_module(module)
