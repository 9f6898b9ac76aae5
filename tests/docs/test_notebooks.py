"""Notebooks are whole, stored without outputs, and name commands and configs that exist; .ci/matrix runs them."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from latentreward.apps.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_page_links_all() -> None:
    linked = LINK.findall((ROOT / "docs" / "notebooks.md").read_text())
    assert {f"notebooks/{path.name}" for path in NOTEBOOKS} == {link for link in linked if link.endswith(".ipynb")}
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_it_was_before_it_ran(path: Path) -> None:
    content = json.loads(path.read_text())
    assert (content["nbformat"], content["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path, "code"))
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_commands_configs_and_links_exist(path: Path) -> None:
    trees = [ast.parse("".join(cell["source"])) for cell in cells(path, "code")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    commands = [call.args[0].value for call in calls if getattr(call.func, "id", "") == "latentreward"]
    assert {"fit", "taste"} & set(commands) and set(commands) <= COMMANDS.keys()
    text = path.read_text()
    for name in re.findall(r"\bconfigs/[a-z0-9_/]+\.yaml", text):
        assert (ROOT / name).is_file(), name
    for cell in cells(path, "markdown"):
        for link in LINK.findall("".join(cell["source"])):
            assert (FOLDER / link).is_file(), link
