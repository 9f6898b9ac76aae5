"""``latentreward publish``: from a run to a folder that others load, score with and trust."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from latentreward.apps.cli import main
from latentreward.core.storage import durable
from latentreward.reward import RewardModel, ScoringNoise
from latentreward.reward.scoring import publishing
from tests.alignment.rewards.stored import write_run
from tests.marks import slow_after
from tests.reward.scoring.test_published import write_lrm
from tests.tiny_pipelines import pipeline_folder

pytestmark = pytest.mark.usefixtures("bases_here")

PROMPTS = ("a cat", "two dogs", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish") / "run"
    write_run(folder, "dina", "sd35", lora={"rank": 2, "alpha": 3.0})
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 JPEGs and a list, whose images 5 and 17 are no whole ones."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    with (folder / "list.jsonl").open("w") as file:
        for number in range(40):
            name = f"{number:02}.jpg"
            Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / name)
            file.write(json.dumps({"image": name, "prompt": PROMPTS[number % 3]}) + "\n")
    (folder / "05.jpg").write_bytes((folder / "05.jpg").read_bytes()[:200])
    (folder / "17.jpg").unlink()
    return folder


def publish(*arguments: Any) -> None:
    main(["publish", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        publish(*arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


@pytest.mark.slow
def test_a_run_is_published_calibrated(run: Path, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    reference = [f"--reference.images={pictures / 'list.jsonl'}", "--reference.name=forty pictures"]
    words = ["--licence=apache-2.0", '--datasets=["owner/pairs", "our own"]', "--description=Scores **tiny** pictures."]
    out = tmp_path / "model"
    publish(run, out, *reference, *words, "--noise.sigmas=[0.3,0.6]")
    said = capsys.readouterr()
    assert "calibrated at sigma 0.3+0.6 on 38 images of forty pictures" in said.out
    assert "2 of 40 reference images are left out" in said.err
    assert "38 different images in 38 rows; z_score and quantile are rough" in said.err
    model = RewardModel.from_pretrained(out)
    assert model.noise == ScoringNoise(sigmas=(0.3, 0.6))
    rows = [json.loads(line) for line in (pictures / "list.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["image"] not in ("05.jpg", "17.jpg")]
    scores = RewardModel.from_pretrained(run).score(
        [row["prompt"] for row in rows], [pictures / row["image"] for row in rows], noise=model.noise
    )
    assert model.calibration.mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert model.calibration.std == pytest.approx(scores.std().item(), rel=1e-4)
    torch.testing.assert_close(
        model.calibration.quantile(scores).sort().values, torch.linspace(0, 1, 38), atol=0.01, rtol=0
    )
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "latentreward"
    assert front["datasets"] == ["owner/pairs"]
    for text in (
        "Scores **tiny** pictures.",
        "owner/pairs, our own",
        "forty pictures: 38 images",
        "0.3, 0.6",
    ):
        assert text in card


PICKED = {"class_path": "latentreward.data.PickAPicReader", "init_args": {"source": "/secret/a"}}
FILTERED = {"class_path": "latentreward.data.FilteredReader", "init_args": {"reader": PICKED, "scores": "/secret/b"}}
VAL = {"class_path": "latentreward.data.HPDv2Reader", "init_args": {"root": "/secret/c"}}
CACHED = "latentreward.diffusion.CachedPreferenceDataModule"
DATA = {
    "filtered": (
        {"class_path": "latentreward.data.PreferenceDataModule", "init_args": {"train": FILTERED, "val": VAL}},
        "FilteredReader",
    ),
    "cached": ({"class_path": CACHED, "init_args": {"train": {"cache": "/secret/d"}}}, "CachedPreferenceDataModule"),
    "none": (None, "not stated"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(2, DATA))
def test_the_card_names_the_runs_readers_and_no_paths(run: Path, tmp_path: Path, name: str) -> None:
    data, told = DATA[name]
    settings = yaml.safe_load((run / "config.yaml").read_text()) | ({"data": data} if data else {})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    publish(run, tmp_path / "model", f"--run_config={tmp_path / 'config.yaml'}")
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| data | {told} |" in card
    assert "secret" not in card + (tmp_path / "model" / "config.json").read_text()


@pytest.mark.slow
def test_a_published_layout_is_published_with_its_base(tmp_path: Path, capsys: Any) -> None:
    write_lrm(tmp_path / "lrm", "sd15")
    base = pipeline_folder("sd15")
    capsys.readouterr()
    assert "load it with base=" in refused(capsys, tmp_path / "lrm", tmp_path / "out")
    publish(tmp_path / "lrm", tmp_path / "out", f"--base={base}", "--base_name=owner/sd15@fp32")
    assert "not calibrated" in capsys.readouterr().out
    ours, theirs = (RewardModel.from_pretrained(tmp_path / name, base=base) for name in ("out", "lrm"))
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(ours.score_latents("a cat", latents), theirs.score_latents("a cat", latents))
    assert "base_model: owner/sd15\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_published_again_at_other_noise_it_loses_its_calibration(
    run: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    publish(run, tmp_path / "model", f"--reference.images={pictures / 'list.jsonl'}")
    publish(tmp_path / "model", tmp_path / "same", "--noise.seeds=[3]")
    assert RewardModel.from_pretrained(tmp_path / "same").calibration is not None
    publish(tmp_path / "model", tmp_path / "other", "--noise.sigmas=[0.9]")
    assert RewardModel.from_pretrained(tmp_path / "other").calibration is None
    publish(tmp_path / "other", tmp_path / "other", "--noise.sigmas=[0.8]")
    assert RewardModel.from_pretrained(tmp_path / "other").noise == ScoringNoise(sigmas=(0.8,))


@pytest.mark.parametrize(("module", "step"), slow_after(1, [(publishing, "write_tensors"), (durable, "_swapped")]))
def test_ctrl_c_leaves_a_whole_folder_or_none(
    run: Path, tmp_path: Path, module: Any, step: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Before the weights are written, or once all is there and only its name is missing."""
    own = getattr(module, step)

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return own(*arguments)

    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(SystemExit) as stop:
        publish(run, tmp_path / "model")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "latentreward: stopped by Ctrl-C\n"
    assert [path.name for path in tmp_path.iterdir()] == ([] if module is publishing else ["model"])
    if module is not publishing:
        RewardModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size=0"], "batch_size: 0 must be"),
        (["--reference.images=none"], "none"),
        (["--reference.images={few}"], "has 3 images with prompts; a calibration needs at least 20"),
        (["--reference.images={few}", "--reference.limit=5"], "reference.limit=5 must be at least 20"),
        (["--noise.sigmas=[2]"], "noise.sigmas holds 2"),
    ],
)
def test_bad_input(arguments: list[str], message: str, run: Path, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    lines = (pictures / "list.jsonl").read_text().splitlines()[:3]
    few = pictures / "few.jsonl"
    few.write_text("\n".join(lines))
    said = refused(capsys, run, tmp_path / "out", *(argument.format(few=few) for argument in arguments))
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()
