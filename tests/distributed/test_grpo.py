"""GRPO on two processes, watched by every monitor, equals that on one; nobody waits for nobody."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.grpo_runs import CASES, make_module, train
from tests.distributed.ranks import on_ranks
from tests.distributed.strategies import strategies_of
from tests.marks import WITH_ITS_FILE

pytestmark = WITH_ITS_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return on_ranks("tests.distributed.grpo_runs:all_cases", folder, timeout=600)


@pytest.mark.parametrize(("method", "pipeline"), CASES)
def test_two_processes_equal_one(method: str, pipeline: str, ranks: Any, folder: Path, tmp_path: Path) -> None:
    start = {name: p.detach().clone() for name, p in make_module(method, pipeline).named_parameters()}
    one = train(method, pipeline, "auto", 1, tmp_path)
    assert max((value - start[name]).abs().max() for name, value in one["weights"].items()) > 1e-4
    for strategy in strategies_of(method):
        for two in (rank[f"{strategy} {method}"] for rank in ranks):
            for name, value in one["weights"].items():
                torch.testing.assert_close(two["weights"][name], value, rtol=1e-4, atol=2e-5)
            assert two["metrics"] == pytest.approx(one["metrics"], rel=2e-2, abs=1e-4)
        ours, theirs = (place / "samples" / "step_000002.png" for place in (tmp_path, folder / strategy / method))
        assert ours.stat().st_size == pytest.approx(theirs.stat().st_size, rel=0.02)
