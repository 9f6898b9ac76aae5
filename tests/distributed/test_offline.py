"""Diffusion-DPO, Linear-DPO, ReFL and PRFL on two processes equal those on one."""

from typing import Any

import pytest
import torch

from latentreward.alignment.policies.moving_average import AVERAGE
from tests.distributed.offline_runs import CASES, make_module, train
from tests.distributed.ranks import on_ranks
from tests.distributed.strategies import strategies_of
from tests.marks import WITH_ITS_FILE

pytestmark = WITH_ITS_FILE


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks("tests.distributed.offline_runs:all_cases", tmp_path_factory.mktemp("ranks"), timeout=900)


@pytest.mark.parametrize(("method", "pipeline"), CASES)
def test_two_processes_equal_one(method: str, pipeline: str, ranks: list[dict[str, Any]]) -> None:
    start = {name: p.detach().clone() for name, p in make_module(method, pipeline).named_parameters()}
    one = train(method, pipeline, "auto", 1)
    assert max((value - start[name]).abs().max() for name, value in one.items()) > 1e-4
    moved = [name for name in one if f".{AVERAGE}." in name and not torch.equal(one[name], start[name])]
    assert bool(moved) == (method == "linear_dpo")
    for strategy in strategies_of(method):
        for rank in ranks:
            two = rank[f"{strategy} {method} {pipeline}"]
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-5)
