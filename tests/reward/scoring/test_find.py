"""Which checkpoint stands for the folder of a run, above all after a second run into it."""

import csv
import os
from pathlib import Path

import pytest
from PIL import Image

from latentreward.apps.cli import main
from latentreward.reward.scoring.find import checkpoint_of
from tests.core.settings.test_refusals import FIT

FEW = ["--data.train_pairs=4", "--data.val_pairs=4", "--data.batch_size=2", "--data.num_workers=0"]


@pytest.mark.parametrize(
    ("names", "taken", "told"),
    [
        (["last-step", "last"], "last", ""),
        (["last", "last-step"], "last", "holds 2 checkpoints: last.ckpt is taken, though last-step.ckpt is newer"),
        (["last", "last-v1"], "last-v1", "last-v1.ckpt is taken; give"),
        (["last-v1", "last-v2", "last"], "last", "last.ckpt is taken; give"),
        (["last", "reward", "reward-v1"], "reward-v1", "reward-v1.ckpt is taken; give"),
        (["reward", "last"], "reward", "reward.ckpt is taken, though last.ckpt is newer"),
        (["step=1", "step=2"], "step=2", "step=2.ckpt is taken; give"),
        (["best"], "best", ""),
    ],
)
def test_the_newest_of_the_preferred_names(names: list[str], taken: str, told: str, tmp_path, caplog) -> None:
    for age, name in enumerate(reversed(names)):
        (tmp_path / f"{name}.ckpt").touch()
        os.utime(tmp_path / f"{name}.ckpt", (10_000 - age, 10_000 - age))
    assert checkpoint_of(tmp_path) == tmp_path / f"{taken}.ckpt"
    assert told in caplog.text
    assert bool(told) == bool(caplog.text)


@pytest.mark.slow
def test_commands_take_the_checkpoint_of_the_second_run(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    for steps in (1, 2):
        main([*FIT, *FEW, "--trainer.limit_val_batches=0", f"--trainer.max_steps={steps}"])
    first, second = (Path("runs/run/checkpoints") / f"{name}.ckpt" for name in ("last", "last-v1"))
    assert first.is_file()
    Path("pictures").mkdir()
    Image.new("RGB", (32, 32), (200, 20, 20)).save("pictures/a.png")
    scores = []
    for number, model in enumerate(("runs/run", first, second)):
        main(["score", "pictures", f"{number}.csv", f"--model={model}", "--prompt=a cat"])
        scores += [row["score"] for row in csv.DictReader(Path(f"{number}.csv").read_text().splitlines())]
    assert scores[0] == scores[2] != scores[1]
    assert "checkpoints/last-v1.ckpt is taken" in caplog.text
