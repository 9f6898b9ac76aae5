"""Digests of the package's source files, on which results in miniature depend."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import latentreward
from latentreward.core.storage.digests import digest
from tools.measured import CLONE, PACKAGE

WEIGHTS = PACKAGE / "tinyworld"
"""Folder of the shipped tiny networks, on which all results depend beside source files."""
RUNNER = ("latentreward.apps.taste.steps", *(f"tools.reproduction.{name}" for name in ("process", "tasks")))
"""Modules that every process imports and that no result depends on."""


def grouped_modules(names: Iterable[str]) -> dict[str, str]:
    """Group names of modules by package: package → names inside it, separated by blanks."""
    groups = defaultdict(list)
    for name in sorted(set(names)):
        package, _, last = name.rpartition(".")
        groups[package].append(last)
    return {package: " ".join(inside) for package, inside in sorted(groups.items())}


def module_names(groups: Mapping[str, str]) -> list[str]:
    """Undo :func:`grouped_modules`."""
    return [f"{package}.{name}".strip(".") for package, inside in groups.items() for name in inside.split()]


def source_digest(names: Iterable[str]) -> str:
    """Digest the source files of modules, without comments and docstrings, and the shipped tiny networks.

    A module whose file is gone counts with an empty file.
    """
    files = {name: _file_of(name) for name in sorted(set(names) - set(RUNNER))}
    digests = {name: _digest_as_of(path, path.stat().st_mtime_ns) if path else "" for name, path in files.items()}
    return digest([*(f"{name} {found}\n" for name, found in digests.items()), weights_digest()])


@cache
def _digest_as_of(path: Path, changed: int) -> str:
    return code_digest(path.read_text(encoding="utf-8"))


def _file_of(name: str) -> Path | None:
    """Find a module's source file without importing the module."""
    folders, origin, parts = [str(CLONE)], None, name.split(".")
    if parts[0] == "latentreward":
        folders, origin, parts = list(latentreward.__path__), latentreward.__file__, parts[1:]
    for part in parts:
        spec = PathFinder.find_spec(part, folders)
        if spec is None:
            return None
        folders, origin = list(spec.submodule_search_locations or ()), spec.origin
    return Path(origin) if origin else None


def code_digest(text: str) -> str:
    """Digest Python source by its syntax tree: comments, docstrings and layout do not count."""
    return digest([repr(_plain(ast.parse(text)))])


def _plain(node: object) -> object:
    """Turn a syntax tree into nested tuples, without docstrings and empty fields.

    ``ast.dump`` shows empty fields in Python 3.11 and 3.12 but not in 3.13.
    """
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if documented and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return (type(node).__name__, *((name, _plain(value)) for name, value in fields.items() if value not in (None, [])))


@cache
def weights_digest() -> str:
    """Digest the shipped tiny networks."""
    files = (path for suffix in ("json", "safetensors") for path in WEIGHTS.rglob(f"*.{suffix}"))
    return digest(part for path in sorted(files) for part in (path.relative_to(WEIGHTS).as_posix(), path.read_bytes()))
