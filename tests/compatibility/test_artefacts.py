"""What an older version left on disk loads today, scores as it did, and its runs go on to the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentreward.cli import main
from tests.compatibility.make import CACHING, MODELS, QUIET, SETTINGS, arithmetic, scores_of
from tests.marks import rotated_after

VERSION = Path(__file__).parent / "06e0993"
RECORD = json.loads((VERSION / "scores.json").read_text())


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(VERSION, tmp_path_factory.mktemp("compatibility") / "copy"))


@pytest.fixture(autouse=True)
def _in_the_copy(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)


def assert_same(found: Any, recorded: Any) -> None:
    """Equal to the bit where torch is the recorded one and rounds as it did there, and nearly equal elsewhere."""
    same = (RECORD["torch"], RECORD["arithmetic"]) == (torch.__version__, arithmetic())
    tolerance = {"rtol": 0.0, "atol": 0.0} if same else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, recorded, **tolerance)


@pytest.mark.parametrize("model", rotated_after(2, MODELS))
def test_scores(model: str) -> None:
    assert_same(torch.tensor(scores_of(model)), torch.tensor(RECORD["scores"][model]))


@pytest.mark.parametrize("run", rotated_after(1, SETTINGS))
def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_end(run: str) -> None:
    resumed = ("--trainer.default_root_dir=resumed", f"--trainer.logger.name=resumed/{run}")
    main(["fit", f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last-step.ckpt", *resumed, *QUIET])
    found, recorded = (
        torch.load(folder / run / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (Path("resumed"), Path())
    )
    assert (found["global_step"], found["epoch"]) == (recorded["global_step"], recorded["epoch"])
    for part in ("state_dict", "optimizer_states"):
        assert_same(found[part], recorded[part])
    average = recorded["callbacks"].get("TrainableEMA")
    assert (average is not None) == (run == "dina")
    assert_same(found["callbacks"].get("TrainableEMA"), average)


def test_the_cache_is_the_one_that_todays_settings_make(capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in Path("cache").rglob("*") if path.is_file()}
    main(["cache", "cache", *CACHING])
    assert "14 pairs, 28 images, 15 prompts" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("cache").rglob("*") if path.is_file()} == before


def test_the_policys_adapter_is_exported() -> None:
    """With alpha / rank, 2, in B, where that version left it to the metadata."""
    main(["export", "lpo/checkpoints/last.ckpt", "exported"])
    name = "pytorch_lora_weights.safetensors"
    found, recorded = load_file(Path("exported", name)), load_file(Path("lpo", "lora", name))
    assert found.keys() == recorded.keys()
    assert all(torch.equal(found[key], recorded[key] * (2 if "lora_B" in key else 1)) for key in recorded)
