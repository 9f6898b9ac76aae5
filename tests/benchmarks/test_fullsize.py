"""``make fullsize`` with tiny networks: jobs run, keep their results, and are not run again."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from latentreward.apps.cli import main
from tests.marks import rotated_after

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fullsize"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Module that lists the jobs."""
    monkeypatch.syspath_prepend(str(SCRIPT))
    return importlib.import_module("jobs")


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
