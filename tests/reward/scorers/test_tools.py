"""Scorers that run other programs: real programs, written here, and tables of scores."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.reward.scorers.tools import CommandScorer, JudgedPicture, ScoreFile

COUNT_ALPHA = """
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
with open(sys.argv[2], "w") as output:
    for row in rows[::-1]:
        output.write(json.dumps({"file": row["file"], "score": sum(map(str.isalpha, row["prompt"]))}) + "\\n")
"""


def pictures(
    folder: Path, prompts: Sequence[str], count: int = 1, groups: Sequence[str] | None = None, ending: str = "png"
) -> list[JudgedPicture]:
    """Pictures whose red level is 10 · place + number."""
    folder.mkdir(exist_ok=True)
    made = []
    for place, prompt in enumerate(prompts):
        for image in range(count):
            file = f"{place}_{image}.{ending}"
            level = np.full((8, 8, 3), 10 * place + image, np.uint8)
            Image.fromarray(level).save(folder / file)
            group = "" if groups is None else groups[place]
            fields = {"tag": group, "include": [], "prompt": prompt}
            made.append(JudgedPicture(place, image, file, folder / file, prompt, group, fields))
    return made


def refusal(scorer: object, items: Sequence[JudgedPicture], work: Path, policy: str = "p") -> str:
    with pytest.raises(InputError) as caught:
        scorer.score_pictures(items, policy, work)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_command_scores_all_pictures(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(COUNT_ALPHA)
    scorer = CommandScorer([sys.executable, str(tmp_path / "count.py"), "{pictures}", "{scores}"], "letters")
    scorer.prepare()
    prompts = ["a cat", 'a «"quoted"» \u2028 ü', "", "; rm -rf $HOME"]
    scores = scorer.score_pictures(pictures(tmp_path / "p", prompts), "p", tmp_path)
    assert scores.tolist() == [sum(map(str.isalpha, prompt)) for prompt in prompts]


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    items = pictures(tmp_path / "p", ["a cat", "a dog"])

    def command(source: str, **options: float) -> CommandScorer:
        return CommandScorer([sys.executable, "-c", source, "{pictures}", "{scores}"], "tool", **options)

    source = "import sys; print('begins', flush=True); sys.exit('CUDA out of memory')"
    failed = refusal(command(source), items, tmp_path)
    assert "tool: python" in failed
    assert "status 1; last line: 'CUDA out of memory', all in " in failed
    assert (tmp_path / "log.txt").read_text().splitlines() == ["begins", "CUDA out of memory"]
    assert "it said nothing" in refusal(command("import os; os._exit(3)"), items, tmp_path)
    assert "no table of scores" in refusal(command("pass"), items, tmp_path)
    half = 'import sys; open(sys.argv[2], \'w\').write(\'{"file": "0_0.png", "score": 1}\')'
    assert "has no row for '1_0.png'" in refusal(command(half), items, tmp_path)
    nan = half.replace("1}", "NaN}")
    assert "0_0.png" in refusal(command(nan), items[:1], tmp_path)
    gone = CommandScorer(["no-such-program", "{scores}"], "tool")
    with pytest.raises(InputError, match="no-such-program is no program"):
        gone.prepare()
    assert "cannot run no-such-program" in refusal(gone, items, tmp_path)


@pytest.mark.slow
def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    source = (
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '60']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    scorer = CommandScorer([sys.executable, "-c", source, "{scores}"], "tool", timeout_s=2)
    start = time.monotonic()
    message = refusal(scorer, pictures(tmp_path / "p", ["a cat"]), tmp_path)
    assert time.monotonic() - start < 20
    assert "no result after timeout_s=2" in message
    child = int((tmp_path / "log.txt").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        pytest.fail("the child lives on")


def test_a_table_of_scores(tmp_path: Path) -> None:
    items = pictures(tmp_path / "p", ["a cat", "a dog"], count=2)
    (tmp_path / "base.csv").write_text("file,hpsv3\n1_1.png,4\n0_0.png,1\n0_1.png,2\n1_0.png,3\n")
    scorer = ScoreFile(str(tmp_path / "{policy}.csv"), "hpsv3")
    assert (scorer.name, scorer.score_pictures(items, "base", tmp_path).tolist()) == ("hpsv3", [1, 2, 3, 4])
    assert "hpsv3: no table of scores" in refusal(scorer, items, tmp_path, "tuned")
    for content, message in {
        "file,hpsv3\n0_0.png,1\n0_0.png,2\n": "several rows for '0_0.png'",
        "file,other\n0_0.png,1\n": "it needs 'hpsv3' and 'file'",
        "file,hpsv3\n0_0.png,bad\n": "bad",
        "file,hpsv3\n0_0.png,inf\n": "it must be a finite number",
        "file,hpsv3\n0_0.png,1\n": "has no row for '0_1.png'",
        "": "not a whole csv file",
    }.items():
        (tmp_path / "base.csv").write_text(content)
        assert message in refusal(scorer, items, tmp_path, "base")
