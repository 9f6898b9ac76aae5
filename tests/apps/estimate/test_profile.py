"""``fit --profile N``: so many steps, a table whose parts add up, a picture, and no checkpoint."""

import re
from pathlib import Path

import pytest
from latentreward.callbacks import Performance
from PIL import Image

from latentreward.apps.cli import main
from latentreward.apps.estimate.profile import WARM_UP, StepProfile
from latentreward.core.peak_rates import Limits
from tests.callbacks.small_run import fit, make_trainer
from tests.callbacks.test_performance import QUICK, RUNS
from tests.marks import rotated_after

CARD = Limits("a card", 2e-9, 1e-6)
QUIET = {"log_every_n_steps": 0, "limit_val_batches": 0}


def rows_of(text: str) -> dict[str, list[str]]:
    """Name of a row → its cells, of the table that is printed."""
    lines = text[text.index(" steps ") - 1 :].splitlines()
    cells = [re.split(r" {2,}", line.strip()) for line in lines]
    return {name: rest for name, *rest in cells if len(rest) == len(cells[0]) - 1}


def test_measured_seconds_stand_beside_the_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, [Performance(), StepProfile(4, CARD)], **QUIET)
    fit(trainer)
    assert trainer.global_step == WARM_UP + 4
    rows = rows_of(capsys.readouterr().out)
    assert rows.pop("4 steps") == [
        "TFLOP",
        "GB",
        "kernels",
        "arithmetic, s",
        "traffic, s",
        "launches, s",
        "measured, s",
    ]
    assert [*rows] == ["data_wait", "forward", "backward", "optimizer", "ema", "log", "a step"]
    for place in (2, 6):
        parts = [float(cells[place]) for name, cells in rows.items() if name != "a step"]
        assert sum(parts) == pytest.approx(float(rows["a step"][place]), abs=3e-4)
    # Batches of 4 rows: the second step is counted alone, without the optimiser's state that the first one makes.
    flops = 2 * (2 * 4 * 4 * 8) + 3 * (2 * 4 * 8)
    assert float(rows["a step"][0]) == pytest.approx(flops / 1e12, rel=1e-3)
    assert float(rows["a step"][3]) == pytest.approx(flops / 2e3, abs=1e-4)
    assert (tmp_path / "profile.md").read_text().startswith("| 4 steps | TFLOP |")
    assert Image.open(tmp_path / "profile.png").width == 800


ROWS = {
    "lrm_tiny": {"encode", "forward"},
    "lpo_tiny": {"encode, a rollout", "rollout, a rollout", "reward, a rollout", "forward"},
    "refl_tiny": {"encode", "rollout", "reward", "forward"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, ROWS))
def test_profiles_of_methods(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"--data.root={tmp_path / 'pairs'}"] if "train_pairs" in str(RUNS[name]) else []
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    main(["fit", *RUNS[name], *data, *QUICK[:2], "--trainer.max_steps=3", folder, "--profile=2"])
    rows = rows_of(capsys.readouterr().out)
    # Though the run has fewer steps than warm-up and profile together.
    assert rows.pop("2 steps") == ["TFLOP", "GB", "kernels", "measured, s"]  # no limits of a CPU are known
    assert ROWS[name] | {"backward", "optimizer", "a step"} <= rows.keys()
    assert all(int(rows[row][2]) > 0 for row in ROWS[name])
    assert {"profile.md", "profile.png"} <= {path.name for path in (tmp_path / "run").rglob("*")}
    assert not [*tmp_path.rglob("*.ckpt")]
