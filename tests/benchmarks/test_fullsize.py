"""``make fullsize`` with tiny networks: jobs run, keep their results, and are not run again."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from latentreward.apps.cli import main
from tests.marks import rotated_after

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fullsize"
RUN = ["LRM-SD1.5 serve", "SD3.5-M cache, T5 whole", "DiNa-Z-Image fit, text encoder cut"]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Module that lists the jobs."""
    monkeypatch.syspath_prepend(str(SCRIPT))
    return importlib.import_module("jobs")


def run(folder: Path, *names: str) -> str:
    command = [sys.executable, SCRIPT, "--tiny", "--rounds=1", f"--folder={folder}", "--only", *names]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.timeout(1800)
def test_jobs_run_once_and_leave_results_alone(tmp_path: Path) -> None:
    printed = run(tmp_path, *RUN)
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    assert len(results) == 9
    assert all(result["peak"] > 0 and f"| {result['name']} | " in printed for result in results.values())
    assert len(results["LRM_SD1.5_fit"]["rounds"]) == 1
    assert run(tmp_path, *RUN) == printed[printed.index("\n**Memory") :]


@pytest.mark.parametrize("subcommand", rotated_after(0, ["fit", "validate", "predict", "cache", "generate"]))
def test_all_commands_parse(
    subcommand: str,
    jobs: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (SCRIPT.parents[1] / "configs").rglob("*.yaml"):
        for name in re.findall(r"\$\{oc\.env:(\w+)", path.read_text()):
            monkeypatch.setenv(name, str(tmp_path))
    commands = [jobs.Sizes(64, 3, "cpu").of(job.command) for _, job in jobs.jobs()]
    found = [command for command in commands if command[0] == subcommand]
    assert found
    for command in found:
        with pytest.raises(SystemExit) as ended:
            main([*command, "--print_config"])
        assert not ended.value.code, capsys.readouterr().err
