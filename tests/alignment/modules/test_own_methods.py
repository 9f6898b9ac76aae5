"""docs/own_methods.md: a loss and a method of one's own, run and resumed as a user would."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.processes import finish

PAGE = Path(__file__).resolve().parents[3] / "docs" / "own_methods.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in re.findall(r"<!-- ([^\n]+) -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        (tmp_path / name).write_text(text)
    return tmp_path


def fit(folder: Path, *arguments: str) -> None:
    run = finish(arguments, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (last,) = folder.rglob("last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 6
    return checkpoint["state_dict"]


@pytest.mark.slow
def test_a_method_resumes_in_the_middle_of_a_rollout(folder: Path) -> None:
    first, second = (shlex.split(line)[1:] for line in (folder / "commands").read_text().splitlines())
    fit(folder, *first)
    fit(folder, *second)
    fit(folder, *first, "--trainer.max_steps=6", "--trainer.default_root_dir=straight")
    resumed, straight = weights(folder / "runs"), weights(folder / "straight")
    assert any(weight.any() for name, weight in straight.items() if "lora_B" in name)
    assert all(torch.equal(weight, resumed[name]) for name, weight in straight.items())


@pytest.mark.slow
def test_lpo_takes_a_loss_of_ones_own(folder: Path) -> None:
    fit(
        folder,
        *("fit", "--config", "configs/align/lpo_tiny.yaml", "--config", "ipo.yaml", "--trainer.max_steps=1"),
        *("--model.reward", "RandomReward", "--model.reward.kind=readout", "--model.sampling.num_inference_steps=4"),
        *("--model.selection=QuantileThreshold", "--data.prompts_per_rollout=2", "--data.batch_size=2"),
    )
