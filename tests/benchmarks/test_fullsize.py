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


@pytest.mark.slow
@pytest.mark.release
def test_a_group_replaces_a_half_written_result_and_leaves_no_pipeline_behind(tmp_path: Path) -> None:
    settings, result = tmp_path / "settings.json", tmp_path / "results" / "LRM_SDXL_forward__bf16.json"
    settings.write_text('{"tiny": true, "accelerator": "cpu", "rounds": 1}')
    result.parent.mkdir()
    result.write_text('{"half')
    run(tmp_path, "LRM-SDXL forward, bf16")
    assert json.loads(result.read_text())["name"] == "LRM-SDXL forward, bf16"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "results", "settings.json"}


def refused(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script with options that it does not take."""
    command = [sys.executable, SCRIPT, f"--folder={folder}", *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    return ended


def test_results_of_other_options_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"tiny": true, "accelerator": "cpu", "rounds": 6}')
    for options in ([], ["--tiny", "--accelerator=gpu"], ["--tiny", "--rounds=2"]):
        ended = refused(tmp_path, "--only", "LRM-SD1.5 fit", *options)
        assert (
            f'{tmp_path} has results of tiny true, accelerator "cpu", rounds 6; choose another --folder' in ended.stderr
        )
        assert not ended.stdout


def test_a_folder_of_unknown_options_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert "has results of options that it does not tell; choose another" in refused(tmp_path).stderr
    assert not (tmp_path / "settings.json").exists()


def test_a_job_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    ended = refused(tmp_path / "work", "--tiny", "--only", "LRM-SD1.5 serf")
    assert "--only: there is no job 'LRM-SD1.5 serf'; choose from 'LRM-SD1.5 fit', " in ended.stderr
    assert not (tmp_path / "work").exists()


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
