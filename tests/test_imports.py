"""Imports point one way, and every package folder ships."""

import ast
import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.source_code import parsed

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "latentreward"
ROOMS = ("core", "data", "diffusion", "reward", "alignment")
MAY_IMPORT = {room: {*ROOMS[:place]} for place, room in enumerate(ROOMS)} | {
    "callbacks": {*ROOMS},
    "tinyworld": {*ROOMS[:4]},
    "apps": {*ROOMS, "callbacks", "tinyworld"},
}
"""Room -> rooms that it may import."""


def modules_named(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Modules that a statement imports, or imports from."""
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]


@cache
def imports(path: Path, for_types: bool = True) -> list[ast.Import | ast.ImportFrom]:
    """Import statements of a file, in functions too, with or without those below ``if TYPE_CHECKING``."""
    nodes = statements(parsed(path), for_types)
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def statements(node: ast.AST, for_types: bool) -> Iterator[ast.stmt]:
    """Statements below a node, those of functions and classes included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case) and (
            for_types or not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"))
        ):
            yield child
            yield from statements(child, for_types)


def imported_rooms(path: Path) -> set[str]:
    """First part below ``latentreward`` of all imports in a file, lazy ones and those for types included."""
    rooms = set()
    for node in imports(path):
        names = modules_named(node)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if names == ["latentreward"]:
                names = [f"latentreward.{alias.name}" for alias in node.names]
        rooms |= {f"{name}.".split(".")[1] for name in names if name.split(".")[0] == "latentreward"}
        assert "callbacks" not in {name.split(".")[0] for name in names}, f"{path}: say latentreward.callbacks"
    return rooms - {"__version__"}


def test_every_room_is_listed() -> None:
    names = {path.name for path in SOURCE.iterdir() if "__" not in path.name}
    assert {*names, "callbacks"} == {*MAY_IMPORT, "py.typed", "testing.py"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room: str) -> None:
    """Also imports inside functions, and modules that ``import_module`` names."""
    for path in (ROOT / room if room == "callbacks" else SOURCE / room).rglob("*.py"):
        named = re.findall(r"""import_module\(f?["']latentreward\.(\w+)""", path.read_text())
        extra = (imported_rooms(path) | {*named}) - MAY_IMPORT[room] - {room, "", "configs"}
        assert not extra, f"{path.relative_to(ROOT)} must not import {sorted(extra)}"


def module_name(path: Path) -> str:
    """Dotted name of a file; callbacks/ is installed as ``latentreward.callbacks``, and tools/ is not installed."""
    top = SOURCE.parent if path.is_relative_to(SOURCE) else ROOT
    parts = path.relative_to(top).with_suffix("").parts
    parts = parts if parts[0] in ("latentreward", "tools") else ("latentreward", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path for folder in (SOURCE, ROOT / "callbacks", ROOT / "tools") for path in folder.rglob("*.py")
}


@pytest.fixture(scope="module", autouse=True)
def _all_parsed() -> None:
    """Parse every file once, which takes a second."""
    for path in FILES.values():
        parsed(path)


def test_the_package_imports_nothing_that_is_not_installed() -> None:
    for name, path in FILES.items():
        named = {module for node in imports(path) for module in modules_named(node)}
        assert name.startswith("tools") or not {one for one in named if one.split(".")[0] == "tools"}, name


def test_every_package_folder_is_listed_in_setup_cfg() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = {path.parent.relative_to(SOURCE.parent) for path in SOURCE.rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"latentreward.callbacks", "latentreward.configs"}
    assert set(config["options"]["packages"].split()) == packages


PROMISED_BY = {
    "annotated_types": "pydantic",
    "lightning_utilities": "lightning",
    "markupsafe": "jinja2",
    "starlette": "fastapi",
}
"""Modules that come with a requirement which promises them."""
OTHER_NAMES = {"PIL": "pillow", "yaml": "pyyaml"}


def requirements(*extras: str) -> dict[str, Requirement]:
    """Requirements of the package and of some extras by name."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    found = [Requirement(line) for text in texts for line in text.strip().splitlines()]
    return {canonicalize_name(one.name): one for one in found if one.name != "latentreward"}


def test_what_is_imported_is_required() -> None:
    """What another requirement happens to bring may be gone with its next release."""
    required = requirements("cluster", "quant", "serve", "video").keys()
    for path in FILES.values():
        for node in imports(path, for_types=False):
            for module in (
                {name.split(".")[0] for name in modules_named(node)}
                - sys.stdlib_module_names
                - {"latentreward", "tools"}
            ):
                name = PROMISED_BY.get(module, OTHER_NAMES.get(module, module))
                assert canonicalize_name(name) in required, f"{path.relative_to(ROOT)} imports {module}"


def test_each_lower_bound_is_among_the_floors() -> None:
    floors = [Requirement(line) for line in (ROOT / ".ci/floors.txt").read_text().splitlines() if line[0] != "#"]
    pinned = {canonicalize_name(floor.name): str(floor.specifier).removeprefix("==") for floor in floors}
    for name, requirement in requirements("cluster", "serve", "test", "video", "wandb").items():
        assert name in pinned, name
        bound = next(one.version for one in requirement.specifier if one.operator == ">=")
        assert f"{pinned[name]}.".startswith(f"{bound}."), name
        assert requirement.specifier.contains(pinned[name]), name
