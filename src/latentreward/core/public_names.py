"""Public names of the rooms: where each is defined, read from the rooms' stubs without an import of the rooms.

Settings may name a class without its module. jsonargparse finds such a class only once its module is imported, so that
:func:`import_said` imports what settings say, and nothing else.
"""

import ast
import logging
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latentreward.core import registry
from latentreward.core.registry import backbone_names

logger = logging.getLogger(__name__)
PACKAGE = Path(__file__).parents[1]
FACES = ("data", "diffusion", "reward", "alignment", "tinyworld", "apps/generation", "apps/evaluation/benchmark")
"""Folders whose ``__init__.pyi`` lists what they hand out."""
MOVED = {
    "core": "checkpoints construction contracts devices errors ranks reports settings storage",
    "diffusion": "backbones cache encoders families noise",
    "reward": "heads losses metrics modules remote scorers scoring",
    "alignment": "export policies rewards rollout",
}
"""Room -> folders and files that lay at the top of the package before there were rooms."""


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


def public_path(name: str) -> str:
    """Return the path by which users import a public name: that of its room."""
    module = public_names()[name]
    faces = [f"latentreward.{face.replace('/', '.')}" for face in (*FACES, "callbacks")]
    return f"{next(face for face in faces if module.startswith(f'{face}.'))}.{name}"


def forwarding(package: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a folder in a room, for imports of its public names from the folder itself."""
    part = f".{package.rpartition('.')[2]}."

    def find(name: str) -> Any:
        if part in f"{(module := public_names().get(name, ''))}.":
            return getattr(import_module(module), name)
        if part == ".backbones." and (name in backbone_names() or hasattr(registry, name)):
            return registry.factory_of(name) if name in backbone_names() else getattr(registry, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def renewed(text: str) -> str:
    """Replace dotted paths from before there were rooms by today's in a YAML text or an argument; each is told."""

    def replaced(found: re.Match[str]) -> str:
        if (new := new_path(found[0])) != found[0]:
            logger.warning("%s has moved; say %s", found[0], new)
        return new

    return re.sub(r"(?<![\w./-])latentreward(?:\.\w++)++(?![/-])", replaced, text)


def import_said(text: str) -> None:
    """Import the public classes whose names stand in ``text``."""
    for name in set(re.findall(r"\b[A-Z]\w+", text)) & public_names().keys():
        import_module(public_names()[name])


def import_all(part: str = "") -> None:
    """Import the public classes of all modules whose dotted names contain ``part``, for lists of choices."""
    for module in {one for one in public_names().values() if part in f"{one}."}:
        import_module(module)


def new_path(path: str) -> str:
    """Return today's path of a class or module that lay elsewhere, also in another file of its room; others stay."""
    first, (module, _, last) = path.split(".")[1], path.rpartition(".")
    room = next((room for room, moved in MOVED.items() if first in moved.split()), None)
    if room is None:
        lies = f"{public_names().get(last, module)}."  # a name of a room is found by itself, whatever file held it
        return path if lies.startswith(f"{module}.") else public_path(last)
    if last in backbone_names():
        return backbone_names()[last]
    return public_path(last) if last in public_names() else path.replace(f".{first}", f".{room}.{first}", 1)
