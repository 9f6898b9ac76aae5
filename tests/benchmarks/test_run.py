"""`make bench` skips what is done, runs again what changed, and shows goals."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from _pytest.mark import ParameterSet

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = '''"""Docstring."""
import sys
from measuring import Goal, Spread, table
table("Times", ("case", "s", "ratio", "goal"), [[sys.argv[1], Spread([1.0, 3.0, 2.0]), 0.5, Goal(0.5, most=0.4)]])
'''


@pytest.fixture
def runner(load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = load("run")
    monkeypatch.setattr(found, "FOLDER", tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    return found


def measure(runner: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, case: str = "case") -> Path:
    """What ``script.py`` measured."""
    monkeypatch.setattr(runner.measuring, "TABLES", [])
    monkeypatch.setattr(runner.sys, "argv", [])
    runner.record(folder / "out.json", str(folder / "script.py"), [case])
    return folder / "out.json"


@pytest.mark.slow
def test_figures_are_numbers_with_median_range_and_goal(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(measure(runner, tmp_path, monkeypatch).read_text())
    (row,) = found["tables"][0]["rows"]
    assert row[1] == {"median": 2.0, "range": [1.0, 3.0], "rounds": 3}
    assert row[3] == {"goal": "≤ 0.4, **missed**", "reached": False}
    assert {"processor", "cores", "load", "torch", "diffusers", "transformers", "lightning", "commit"} <= found.keys()
    page = "\n".join(runner.tables_page({"name": found}))
    assert "| name | Times | case | ≤ 0.4, **missed** |" in page
    assert "| case | 2.00 (1.00–3.00) | 0.5 | ≤ 0.4, **missed** |" in page


@pytest.mark.parametrize(
    ("change", "done"),
    [
        (lambda text: text.replace("Docstring", "Other words") + "# a comment\n", True),
        (lambda text: text.replace("0.5, Goal", "0.6, Goal"), False),
    ],
)
def test_done_until_the_code_changes(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str], done: bool
) -> None:
    path = measure(runner, tmp_path, monkeypatch)
    assert runner.is_done(path, ["case"])
    assert not runner.is_done(path, ["another"])
    assert not runner.is_done(tmp_path / "missing.json", ["case"])
    (tmp_path / "script.py").write_text(change(SCRIPT))
    assert runner.is_done(path, ["case"]) is done


def test_done_until_the_package_changes(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = measure(runner, tmp_path, monkeypatch)
    monkeypatch.setattr(runner, "package_digest", lambda: "another")
    assert not runner.is_done(path, ["case"])


def test_package_digest_covers_every_module(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    runner, seen = load("run"), set[str]()
    monkeypatch.setattr(runner, "source_digest", lambda names: str(seen.update(names)))
    runner.package_digest.__wrapped__()
    sources = {path for path in (ROOT / "src/latentreward").rglob("*.py") if path.name not in ("__init__.py",)}
    names = {".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in sources}
    assert names <= seen
    assert "latentreward.callbacks.performance" in seen


def test_every_command_of_the_measurements_page_is_a_benchmark(load: Callable[[str], ModuleType]) -> None:
    named = set(re.findall(r"benchmarks/(\w+)\.py", (ROOT / "docs" / "measurements.md").read_text()))
    run = {one.script for one in load("run").BENCHMARKS.values()}
    assert named - run <= {"run", "gpu"}
    assert run <= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}


def small_benchmarks() -> list[ParameterSet]:
    """Names of those that run at their smallest here, one of them in CI.

    Alignment has tests of its own, start_up compiles torch, and stores runs the script of data.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        known = importlib.import_module("run").BENCHMARKS
    left_out = {"alignment", "start_up", "data"}
    names = [name for name, one in known.items() if one.quick != "--help" and not left_out & {one.script, name}]
    return [pytest.param(name, marks=[pytest.mark.release] * (name != "true_width")) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", small_benchmarks())
def test_a_benchmark_runs_at_its_smallest(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), name, "--quick", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = (tmp_path / "quick").glob("*.json")
    assert found.stem == name
    assert json.loads(found.read_text())["tables"]
