"""Two processes, with DDP and with FSDP2, do what one does with twice the batch: same weights, no hang."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import on_ranks
from tests.distributed.runs import CASES, MODELS, train_case

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks("tests.distributed.runs:all_cases", tmp_path_factory.mktemp("ranks"), timeout=900)


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_two_processes_equal_one(name: str, setting: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    start = {n: p.detach().clone() for n, p in MODELS[name]().named_parameters()}
    one = train_case(name, setting, tmp_path)
    assert max((value - start[key]).abs().max() for key, value in one["weights"].items()) > 5e-5
    for strategy in ("ddp", "fsdp2"):
        for two in (rank[f"{strategy} {name} {setting}"] for rank in ranks):
            assert two["weights"].keys() == one["weights"].keys()
            for key, value in one["weights"].items():
                torch.testing.assert_close(two["weights"][key], value, rtol=1e-5, atol=1e-5)
            for key, value in one["metrics"].items():
                if "loss" not in key:
                    assert two["metrics"][key] == pytest.approx(value, abs=1e-4), key
            if strategy == "fsdp2" or setting == "clipped":
                assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    if setting == "clipped":
        assert one["norms"] == pytest.approx([0.05] * len(one["norms"]), rel=1e-3)
