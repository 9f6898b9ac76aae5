"""Parts of a released script's ``main`` run as they are, and clones with packages of one name stay apart."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = """from tqdm import tqdm
from shared_name import FACTOR

def scaled(value):
    return FACTOR * value

def main(_):
    raise SystemExit("weights are loaded here")
    total = 0
    for epoch in range(9):
        for value in tqdm(enumerate(values), desc="training"):
            total += scaled(value[1])
            seen.append(total)
"""


@pytest.fixture
def scripts(load: Callable[[str], ModuleType]) -> Any:
    return load("released_scripts")


@pytest.fixture
def root(tmp_path: Path, scripts: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scripts, "PLACES", {"one": (), "other": ()})
    monkeypatch.setattr(scripts, "STAND_INS", ())
    for clone, factor in (("one", 2), ("other", 3)):
        (tmp_path / clone / "shared_name").mkdir(parents=True)
        (tmp_path / clone / "shared_name" / "__init__.py").write_text(f"FACTOR = {factor}\n")
        (tmp_path / clone / "train.py").write_text(SCRIPT)
    return tmp_path


@pytest.mark.slow
def test_a_loop_runs_with_the_names_that_it_gets(root: Path, scripts: Any) -> None:
    found: dict[str, list[int]] = {}
    for clone in ("one", "other"):
        loop = scripts.part_of(scripts.script(root, clone, "train.py"), ast.For, "enumerate(values)")
        loop({"values": [1, 10], "seen": found.setdefault(clone, [])})
    assert found == {"one": [2, 22], "other": [3, 33]}
    assert "shared_name" not in sys.modules
    assert str(root / "one") not in sys.path


@pytest.mark.slow
def test_a_part_or_clone_that_is_not_there(root: Path, scripts: Any) -> None:
    with pytest.raises(LookupError, match="no With with 'decay'"):
        scripts.part_of(scripts.script(root, "one", "train.py"), ast.With, "decay")
    with pytest.raises(SystemExit, match="there is no clone LPO in this folder"):
        scripts.add_released(root, "LPO")
