"""The stored folder of a published reward loads as it was written."""

import json
from pathlib import Path

import torch

from latentreward.reward import RewardModel
from tests.artefacts import FOLDERS, scores_of

FOLDER = FOLDERS["published"]


def test_it_scores_as_it_did() -> None:
    recorded = torch.tensor(json.loads((FOLDER / "scores.json").read_text()))
    torch.testing.assert_close(torch.tensor(scores_of(str(FOLDER))), recorded, rtol=1e-4, atol=1e-4)


def test_it_is_saved_with_the_same_entries(tmp_path: Path) -> None:
    RewardModel.from_pretrained(FOLDER).save_pretrained(tmp_path / "again")
    before, again = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, tmp_path / "again"))
    for noise in (before["noise"], before["calibration"]["noise"]):
        assert noise.pop("noise_key") == "prompt"  # earlier versions had a choice
    kept = before.keys() - {"versions", "sha256"}  # of packages, and the bytes that they write
    assert before.keys() == again.keys() and before["sha256"].keys() == again["sha256"].keys()
    assert {name: before[name] for name in kept} == {name: again[name] for name in kept}
