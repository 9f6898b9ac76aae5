"""README's blocks run as printed in a copy of the clone, after a short demo, and print what they show."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(\.\d+)?")
SHORT = "python -m tools.demo --trainer.max_steps=2"
"""What stands in for ``make demo``, which installs the package first and takes minutes."""


def form(line: str) -> str:
    """A line without its numbers and the spaces that align them."""
    return re.sub(r"\s+", "", NUMBER.sub("#", line))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_blocks_run_as_printed(tmp_path: Path) -> None:
    clone = tmp_path / "latentreward"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if name.startswith(("tools/", "configs/", "README")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
    (clone / ".venv").symlink_to(sys.prefix)
    places = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(clone)}
    printed, shown = "", 0
    for language, text in BLOCK.findall((clone / "README.md").read_text()):
        if language == "text":
            forms = {form(line)[: len(form(want))] for want in text.splitlines() for line in printed.splitlines()}
            assert forms >= {form(want) for want in text.splitlines()}, (text, printed)
            shown += 1
            continue
        command = ["bash", "-ec", text] if language == "sh" else [sys.executable, "-c", text]
        if "make demo" in text:
            command = ["bash", "-ec", SHORT]
        done = subprocess.run(
            command, cwd=clone, env={**os.environ, **places}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (text, done.stdout[-2000:], done.stderr[-2000:])
        printed = done.stdout
    assert shown >= 2
    assert (clone / "demo" / "scores.html").is_file()


def test_readme_fits_a_screen_or_three() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
