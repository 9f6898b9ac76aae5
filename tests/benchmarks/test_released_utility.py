"""Courses of training are judged at moments of processor time, and compared by the seconds to a utility."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark(load: Callable[[str], ModuleType]) -> Any:
    return load("released_utility")


def course(benchmark: Any, *points: tuple[float, float]) -> Any:
    """A finished course; its first point is before the training."""
    found = benchmark.Course(SimpleNamespace(before=points[0][1]), [time for time, _ in points[1:]], dict)
    found.points = list(points)
    return found


def test_judging_takes_no_time_and_an_update_past_two_moments_is_judged_once(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, judged = [100.0], []

    def judge(weights: float) -> float:
        now[0] += 50
        judged.append(weights)
        return weights

    monkeypatch.setattr(benchmark.time, "process_time", lambda: now[0])
    judge.before = 0.0  # type: ignore[attr-defined]
    found = benchmark.Course(judge, [2.0, 3.0, 8.0], lambda: float(now[0]))
    found.begin()
    done = []
    for seconds in (1.0, 4.0, 2.0, 2.0):
        now[0] += seconds
        done.append(found.update())
    assert done == [False, False, False, True]
    assert [point[0] for point in found.points] == [0.0, 5.0, 5.0, 9.0]
    assert judged == [105.0, 159.0]
    assert found.updates == 4


@pytest.mark.slow
@pytest.mark.release
def test_our_side_runs_alone(tmp_path: Path) -> None:
    configs = [f"--config={ROOT}/configs/{name}.yaml" for name in ("model/dina_lrm_tiny", "data/tinyworld_hpdv3")]
    reward = [sys.executable, "-m", "latentreward", "fit", *configs, f"--config={ROOT}/configs/trainer/demo.yaml"]
    reward += [f"--data.root={tmp_path}/pairs", "--data.train_pairs=64", "--data.val_pairs=64"]
    reward += [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2", "--trainer.limit_val_batches=1"]
    subprocess.run(reward, cwd=tmp_path, check=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "released_utility.py"), "--quick"]
    command.append(f"--reward={tmp_path}/reward.ckpt")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line.strip("|").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["arm", "RAM", "DiffusionNFT", "trajectory GRPO", "ReFL to a state"]
    assert all(int(row[1]) > 0 and 0 <= float(row[-1]) <= 6 for row in rows[1:])
    assert len({row[2] for row in rows[1:]}) == 1
