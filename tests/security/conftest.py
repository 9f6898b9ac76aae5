"""Sound rewards of every layout, to be copied and spoilt."""

from pathlib import Path

import pytest

from latentreward.reward import RewardModel
from tests.alignment.rewards.stored import write_run
from tests.reward.scoring.test_published import write_dina, write_lrm
from tests.tiny_pipelines import pipeline_folder


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter and one trained as a whole, their model folders, and both published layouts."""
    folder = tmp_path_factory.mktemp("good")
    write_run(folder / "run", "dina", "sd35", lora={"rank": 2, "alpha": 3.0}, tuning="lora")
    write_run(folder / "whole_run", "lrm", "sd15")
    for run, saved, base in (("run", "model", "sd35"), ("whole_run", "whole", "sd15")):
        RewardModel.from_pretrained(folder / run).save_pretrained(folder / saved, base=pipeline_folder(base))
    write_lrm(folder / "lrm", "sd15")
    write_dina(folder / "dina")
    return folder
