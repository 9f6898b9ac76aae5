"""The whole way in the tiny world: from rated pictures to a reward, an aligned generator, and their page."""

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentreward.apps.cli import main
from latentreward.apps.taste.pairs import RATINGS
from latentreward.apps.taste.results import HTML, JSON
from latentreward.apps.taste.steps import DONE
from latentreward.tinyworld.pairs import draw_pairs
from tests.apps.serving.processes import forked_server
from tests.apps.taste.folders import fork_steps, unsorted_folder
from tests.processes import start

pytestmark = pytest.mark.slow
SHORT = ("--base=sd_tiny", "--device=cpu", "--epochs=2", "--num_prompts=2", "--align_always=true")
ALIGN = (
    "--align_settings=[--trainer.max_steps=2, --data.batch_size=4, --data.prompts_per_rollout=4, "
    "--model.sampling.num_inference_steps=5]",
)


def tiny_folder(folder: Path, pairs: int) -> Path:
    """Write pairs that the tiny world draws and labels, with their captions."""
    for number, pair in enumerate(draw_pairs("train", pairs, np.random.default_rng(0), ties=False)):
        pictures = (pair.first, pair.second) if pair.label == 1 else (pair.second, pair.first)
        for side, picture in zip(("chosen", "rejected"), pictures, strict=True):
            (folder / side).mkdir(parents=True, exist_ok=True)
            (folder / side / f"{number:03}.jpg").write_bytes(picture.jpeg)
        (folder / "chosen" / f"{number:03}.txt").write_text(pair.caption)
    return folder


@pytest.fixture
def taste(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command, whose steps are forked from a process that has imported everything; what it prints."""
    fork_steps(monkeypatch)

    def run(*arguments: str) -> str:
        main(["taste", *arguments])
        return "".join(capsys.readouterr())

    return run


@pytest.mark.rotated
def test_from_pairs_to_pictures_before_and_after_and_a_kill(tmp_path: Path, taste: Callable[..., str]) -> None:
    folder, work = tiny_folder(tmp_path / "mine", 40), tmp_path / "work"
    kill_in_training(work, "taste", str(folder), *SHORT, f"--work={work}")
    told = taste(str(folder), *SHORT, f"--work={work}")
    assert "cache: done before" in told and "train: goes on" in told
    assert "accuracy on 10 held-out pairs in %" in told and f"page: {work / HTML}" in told
    assert "Before and after" not in (work / HTML).read_text()
    records = {path: path.stat().st_mtime_ns for path in work.glob(f"*/{DONE}")}
    assert len(records) == 3
    told = taste(str(folder), *SHORT, *ALIGN, "--align", f"--work={work}")
    assert told.count("done before") == 3
    assert records == {path: path.stat().st_mtime_ns for path in records}
    text = (work / HTML).read_text()
    assert "Before and after" in text and text.count("data:image/jpeg") >= 2 * 10 + 2 * 2
    assert json.loads((work / JSON).read_text())["held_out"] == 10
    assert [*work.glob("align-*/out/lora/*.safetensors")]


def kill_in_training(work: Path, *arguments: str) -> None:
    """Start the command in processes of its own, and kill it as soon as the training begins."""
    process = start(arguments)
    end = time.monotonic() + 600
    while not [*work.glob("train-*/log.txt")] and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    process.wait(60)
    time.sleep(2)  # the step's process ends by itself


def test_the_command_serves_the_page_until_it_is_stopped(tmp_path: Path) -> None:
    folder = unsorted_folder(tmp_path / "mine", 3)
    with forked_server("taste", str(folder), "--rate", "--port=0") as server:
        assert server.address.startswith("http://127.0.0.1:")
        assert b"Which one do you prefer?" in urllib.request.urlopen(server.address, timeout=300).read()
        assert server.stop() == 143
        assert f"ratings are kept in {folder / RATINGS}: the same command goes on" in server.process.stderr
