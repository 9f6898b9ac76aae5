"""Which checkpoint stands for the folder of a run, above all after a second run into it."""

import os

import pytest

from latentreward.reward.scoring.find import checkpoint_of


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
