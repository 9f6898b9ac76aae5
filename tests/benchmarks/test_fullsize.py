"""``make fullsize`` with tiny networks: every job runs, keeps its result, and is not run again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fullsize"


def run(folder: Path) -> str:
    command = [sys.executable, SCRIPT, "--tiny", "--rounds=1", "--folder", folder]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_job_runs_once_and_leaves_a_result_alone(tmp_path: Path) -> None:
    printed = run(tmp_path)
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    assert len(results) == 15
    assert {path.name for path in tmp_path.iterdir()} == {"data", "results"}
    assert all(result["peak"] > 0 and f"| {result['name']} | " in printed for result in results.values())
    timed = {name for name, result in results.items() if len(result.get("rounds", ())) == 1}
    assert timed == {"LRM_SD1.5_fit", "LPO_SD1.5_fit", "DiNa_SD3.5_M_fit__T5_cut"}
    again = run(tmp_path)
    assert again == printed[printed.index("\n**Memory") :]
