"""Shape of the code: functions that take a handful of things."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule

from latentreward.apps.cli import COMMANDS
from tests.source_code import parsed

ROOT = Path(__file__).resolve().parents[1]
MOST = 8
SUBCOMMANDS = {name.replace("-", "_") for name in COMMANDS}
FILES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]


@pytest.fixture(scope="module")
def nodes_of_files() -> dict[Path, list[ast.AST]]:
    return {path: [*ast.walk(parsed(path))] for path in FILES}


def named_in_yaml(nodes: Iterable[ast.AST]) -> set[str]:
    """Classes that a shipped YAML or one in the docs names, and the classes of ours that they are derived from."""
    texts = [path.read_text() for path in [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "docs").rglob("*.md")]]
    value = re.compile(r"\w+: (?:[\w.]+\.)?([A-Z]\w+)(?=,|\s*$)", re.MULTILINE)
    found = {name for text in texts for name in value.findall(text)}
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    bases = {node.name: {ast.unparse(base).split("[")[0] for base in node.bases} for node in classes}
    while above := {base for name in found for base in bases.get(name, ())} - found:
        found |= above
    return found


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    named = [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in named if name not in ("self", "cls")]


def test_only_what_yaml_or_the_command_line_sets_has_many_parameters(nodes_of_files: dict[Path, list[ast.AST]]) -> None:
    """Class paths in YAML call constructors; the command line calls subcommands."""
    long, configured = [], named_in_yaml(chain.from_iterable(nodes_of_files.values()))
    for path, nodes in nodes_of_files.items():
        constructors = {
            id(node)
            for kind in nodes
            if isinstance(kind, ast.ClassDef) and kind.name in configured
            for node in kind.body
            if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        }
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(parameters(node)) <= MOST:
                continue
            subcommand = path.parent.name in ("commands", "tools") and node.name in SUBCOMMANDS
            if id(node) not in constructors and not subcommand:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {len(parameters(node))}")
    assert not long


def test_a_module_is_at_most_three_classes_below_lightnings(nodes_of_files: dict[Path, list[ast.AST]]) -> None:
    """A reader of a training step opens the method, its base and the base's base; the rest is functions and parts."""
    classes = [node for node in chain.from_iterable(nodes_of_files.values()) if isinstance(node, ast.ClassDef)]
    bases = {node.name: [ast.unparse(base).split("[")[0] for base in node.bases] for node in classes}

    def derived(name: str) -> bool:
        return any(base == "LightningModule" or derived(base) for base in bases.get(name, ()))

    def levels(name: str) -> int:
        """Count classes of ours down to a class, by its longest way; a mix-in is a level too."""
        return 1 + max(map(levels, bases[name]), default=0) if name in bases else 0

    found = {name: levels(name) for name in bases if derived(name)}
    assert found["LRMModule"] == found["StepAwarePixelModule"] == 2
    assert found["SPOModule"] == found["TrajectoryGRPOModule"] == 3
    assert not {name: count for name, count in found.items() if count > 3}


def test_a_method_without_a_docstring_overrides_one_that_has_it(nodes_of_files: dict[Path, list[ast.AST]]) -> None:
    """Editors and `inspect.getdoc` show that one, so that no docstring need say "See"."""
    classes = defaultdict(list)
    for node in chain.from_iterable(nodes_of_files.values()):
        if isinstance(node, ast.ClassDef):
            classes[node.name].append(node)

    def is_told(kind: ast.ClassDef, name: str) -> bool:
        own = [node for node in kind.body if getattr(node, "name", "") == name and not isinstance(node, ast.ClassDef)]
        above = (base for node in kind.bases for base in classes[ast.unparse(node).split("[")[0].split(".")[-1]])
        return any(map(ast.get_docstring, own)) or any(is_told(base, name) for base in above if base is not kind)

    untold = [
        f"{kind.name}.{node.name}"
        for kind in chain.from_iterable([*classes.values()])
        for node in kind.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any(name.startswith("_") for name in (kind.name, node.name))
        and "override" not in map(ast.unparse, node.decorator_list)  # of a library's method
        and not any(hasattr(hooks, node.name) for hooks in (Callback, LightningModule))
        and not is_told(kind, node.name)
    ]
    assert not untold
