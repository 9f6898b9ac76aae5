"""Shape of the code: functions that take a handful of things."""

import ast
from pathlib import Path

from latentreward.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
MOST = 8
SUBCOMMANDS = {name.replace("-", "_") for name in COMMANDS}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    named = [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in named if name not in ("self", "cls")]


def test_only_what_yaml_or_the_command_line_sets_has_many_parameters() -> None:
    """Constructors are what class paths in YAML call; subcommands are what the command line calls."""
    long = []
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(parameters(node)) <= MOST:
                continue
            if node.name != "__init__" and not (path.parent.name == "commands" and node.name in SUBCOMMANDS):
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {len(parameters(node))}")
    assert not long
