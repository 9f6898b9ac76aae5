"""What is made to be shown to others tells no place on this machine: model folders, reports, galleries."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from latentreward.reward import RewardModel
from tests.alignment.rewards.stored import write_run
from tests.apps.commands.test_evaluate_policy import FAST
from tests.formats.conftest import COMMITTED
from tests.tiny_pipelines import pipeline_folder

PLACES = (b"secret-home", str(Path(pipeline_folder("sd35")).parent).encode(), str(COMMITTED).encode())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, pictures and prompts, whose name no file for others may hold."""
    folder = tmp_path_factory.mktemp("secret-home")
    write_run(folder / "run", "dina", "sd35", lora={"rank": 2, "alpha": 3.0})
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"pictures/{number}.png")
        (folder / f"pictures/{number}.txt").write_text("a cat")
    (folder / "prompts.txt").write_text("a large red circle\n")
    return folder


def told_places(*files: Path) -> list[tuple[str, bytes]]:
    assert files
    return [(file.name, place) for file in files for place in PLACES if place in file.read_bytes()]


@pytest.mark.slow
def test_a_model_folder(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    main(["publish", str(home / "run"), str(home / "model"), "--device=cpu"])
    assert not told_places(*(path for path in (home / "model").rglob("*") if path.is_file()))
    assert json.loads((home / "model/config.json").read_text())["base"] == "sd35"
    assert json.loads((home / "model/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "sd35"
    with pytest.raises(InputError, match=r"the base 'sd35' is the name of a folder .* give your copy as --base FOLDER"):
        RewardModel.from_pretrained(home / "model")
    RewardModel.from_pretrained(home / "model", base=pipeline_folder("sd35"))
    (tmp_path / "sd35").symlink_to(pipeline_folder("sd35"))
    RewardModel.from_pretrained(home / "model")


def test_a_gallery(home: Path) -> None:
    page = home / "page.html"
    main(["score", f"{home}/pictures", f"{home}/s.csv", f"--model={home}/run", f"--gallery={page}", "--device=cpu"])
    assert not told_places(page, home / "s.csv")


@pytest.mark.slow
def test_a_benchmark(home: Path) -> None:
    data = shutil.copytree(COMMITTED / "imagereward", home / "imagereward")
    options = [f"--data={data}", f"--model={home}/run", "--levels=[]", "--limit=2"]
    main(["benchmark", str(home / "bench"), *options])
    assert not told_places(*(home / "bench").glob("report.*"))
    assert "RewardModelScorer run noise of the model" in (home / "bench/report.json").read_text()


@pytest.mark.slow
def test_an_evaluation_of_a_policy(home: Path) -> None:
    shutil.copytree(pipeline_folder("sd15"), home / "generator")
    arguments = {"path": f"{home}/run", "device": "cpu"}
    scorers = json.dumps([{"class_path": "latentreward.reward.RewardModelScorer", "init_args": arguments}])
    options = [f"--prompts={home}/prompts.txt", f"--policy.pipeline={home}/generator", f"--scorers={scorers}"]
    main(["evaluate-policy", str(home / "out"), *options, *FAST])
    assert not told_places(*(home / "out").glob("report.*"), home / "out/scores.csv")
    assert "generator" in (home / "out/report.md").read_text()
