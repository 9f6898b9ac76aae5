"""The stored checkpoints of a reward and of a policy load as they were written, and their runs go on."""

import json
from pathlib import Path

import pytest
import torch

from latentreward.apps.cli import main
from tests.artefacts import QUIET, RUNS, lay_out, scores_of


@pytest.fixture(autouse=True)
def _in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_the_reward_scores_as_it_did() -> None:
    recorded = torch.tensor(json.loads(Path("reward", "scores.json").read_text()))
    torch.testing.assert_close(torch.tensor(scores_of("reward")), recorded, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_stopped_within_an_epoch_goes_on(run: str) -> None:
    checkpoint = Path(run, "checkpoints", "last.ckpt")
    before = torch.load(checkpoint, weights_only=True)
    main(["fit", f"--config={run}/config.yaml", "--ckpt_path=last", "--trainer.max_steps=3", *QUIET])
    after = torch.load(checkpoint, weights_only=True)
    assert (before["global_step"], after["global_step"]) == (2, 3)
    since = {"kind", "start", *(("edits",) if run == "reward" else ())}  # what runs record since it was written
    assert before.keys() | since == after.keys()
    for part in ("state_dict", "callbacks", "loops", "base"):
        assert before[part].keys() == after[part].keys()
