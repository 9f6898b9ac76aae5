"""``latentreward plan-keep``, whose last line is for ``generate``."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from latentreward.apps.cli import main

REWARD = "--reward=tests.apps.generation.toy_rewards.MeanLatentSource"
SMALL = ["--policy.source=sd_tiny", "--guidance_scale=1", "--sampling.num_inference_steps=4", REWARD]


def prompts_in(folder: Path, number: int = 8) -> str:
    (folder / "prompts.txt").write_text("".join(f"a red circle {place}\n" for place in range(number)))
    return str(folder / "prompts.txt")


def test_a_plan_is_printed_and_generate_takes_it(tmp_path: Path, capsys: Any) -> None:
    prompts, picture = prompts_in(tmp_path), tmp_path / "frontier.png"
    main(["plan-keep", prompts, *SMALL, "--candidates=4", "--after=[2, 0, 2]", "--budget=2.5", f"--picture={picture}"])
    printed = capsys.readouterr().out
    assert picture.is_file() and "above best of N in equal time" in printed
    found = re.search(r"in the time of 2.5 samples: (.*)", printed)
    assert found is not None
    main(["generate", prompts, str(tmp_path / "out"), *SMALL, *shlex.split(found[1])])
    assert len([*(tmp_path / "out").glob("*_a-red-circle-*.png")]) == 8


@pytest.mark.parametrize(
    ("number", "options", "told"),
    [
        (7, [], "prompts: 7 are too few to choose by"),
        (8, ["--candidates=1"], "candidates=1"),
        (8, ["--after=[4]"], "the sampler has 4 steps"),
        (8, ["--budget=0.5"], "budget=0.5"),
        (8, ["--after=[]"], "after=[] leaves no step"),
    ],
)
def test_a_pool_that_says_nothing_is_refused(
    tmp_path: Path, capsys: Any, number: int, options: list[str], told: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan-keep", prompts_in(tmp_path, number), *SMALL, *options])
    assert told in capsys.readouterr().err
