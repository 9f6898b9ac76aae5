"""When one rank's reward server fails, all ranks stop, save together and can be resumed."""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import on_ranks


@pytest.mark.slow
def test_ranks_stop_together(tmp_path: Path) -> None:
    first, second = on_ranks("tests.distributed.outage_runs:stop_and_resume", tmp_path, timeout=600)
    end = f"; saved optimiser step 2; go on with --ckpt_path {tmp_path}/stopped/checkpoints/last.ckpt"
    assert first["message"] == f"the reward server of another rank gave no scores; see that rank's message{end}"
    assert "no scores after 1 try" in second["message"]
    assert second["message"].endswith(end)
    for rank in (first, second):
        assert rank["whole"]
        for name, value in first["whole"].items():
            assert torch.equal(rank["whole"][name], value)
            assert torch.equal(rank["resumed"][name], value)
