"""A user's own head, loss, metric, callback, score and filter: docs/own_parts.md, run as a user would run it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.data import PairDataset, PixelLoader
from tests.processes import finish

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own_parts.md"


def write_pairs(folder: Path, split: str, pairs: int) -> None:
    """Pairs of grey pictures; in each other one the preferred picture is the darker."""
    lines = []
    for pair in range(pairs):
        names = [f"{split}{pair}{side}.png" for side in "ab"]
        for name, grey in zip(names, (100 + pair, 180) if pair % 2 else (180, 100 + pair), strict=True):
            Image.new("RGB", (32, 32), (grey, grey, grey)).save(folder / name)
        lines.append(json.dumps({"prompt": f"{split} {pair}", "chosen": names[0], "rejected": names[1]}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.mark.rotated
@pytest.mark.slow
def test_parts_of_a_file_outside_the_package_run_through_yaml_alone(tmp_path: Path) -> None:
    for name, text in re.findall(r"<!-- ([^\n]+) -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        (tmp_path / name).write_text(text)
    (tmp_path / "pairs").mkdir()
    for split, pairs in (("train", 16), ("val", 4)):
        write_pairs(tmp_path / "pairs", split, pairs)
    printed = []
    commands = [line for name in ("commands", "more commands") for line in (tmp_path / name).read_text().splitlines()]
    for command in commands:
        program, *words = shlex.split(command)
        if program == "python":
            run = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        else:
            run = finish(words, cwd=tmp_path)
        assert run.returncode == 0, run.stderr[-3000:]
        printed.append(run.stdout + run.stderr)
    logged = {line.split()[0] for line in (tmp_path / "metrics.txt").read_text().splitlines()}
    assert {"train/loss", "val/accuracy_sigma0.3", "val/LargestMargin_sigma0.3", "val/LargestMargin"} <= logged
    assert "equal weights and scores" in printed[4]
    assert "8 rows kept; left out: 8 brightness gap too low" in printed[2]


def block(name: str) -> dict[str, Any]:
    """What a file of the page defines."""
    text = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[1]
    made: dict[str, Any] = {"__name__": name}
    exec(text, made)
    return made


def test_a_reader_of_ones_own(tmp_path: Path) -> None:
    write_pairs(tmp_path, "train", 1)
    (tmp_path / "votes.txt").write_text("train0a.png train0b.png b A cat on a mat\nnothing\n")
    reader = block("my_reader.py")["VoteReader"]
    with pytest.raises(InputError, match=r"line 2'?: is not FILE FILE VOTE PROMPT"):
        reader(str(tmp_path / "votes.txt"))
    pairs = PairDataset(reader(str(tmp_path / "votes.txt"), on_error="skip"), PixelLoader(32, 32))
    assert len(pairs) == 1 and pairs[0].pair.label_a == 0.0 and pairs[0].pair.prompt == "A cat on a mat"


def fit(tmp_path: Path, config: str, files: tuple[str, str], *options: str) -> None:
    """Take one step of a shipped alignment with two files of the page."""
    for name in files:
        text = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[1]
        (tmp_path / name).write_text(text)
    given = ["fit", "--config", f"configs/align/{config}.yaml", "--config", files[1], "--trainer.callbacks=null"]
    given += ["--trainer.max_steps=1", "--trainer.logger=false", "--data.batch_size=4", *options]
    run = finish([*given, "--model.sampling.num_inference_steps=4"], cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]


def test_rewards_of_alignment_run_through_yaml_alone(tmp_path: Path) -> None:
    fit(tmp_path, "refl_tiny", ("my_rewards.py", "rewards.yaml"), "--model.stop_range=[1, 2]")


def test_rules_of_alignment_run_through_yaml_alone(tmp_path: Path) -> None:
    rewards = ["--model.reward", "RandomReward", "--model.reward.kind=readout"]
    shorter = ["--data.prompts_per_rollout=2", "--model.num_trajectories=2"]
    fit(tmp_path, "grpo_trajectory_tiny", ("my_rules.py", "rules.yaml"), *rewards, *shorter)
