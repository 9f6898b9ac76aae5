"""LPO on two processes: rows of both, the same steps as one, resumed to the bit; no hang if a rank keeps nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.alignment.modules.lpo_runs import saved_run
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow
STRATEGIES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return on_ranks("tests.alignment.modules.lpo_runs:cases_of_two", folder, timeout=900)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    return saved_run(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(strategy: str, ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    two = [rank[strategy] for rank in ranks]
    assert [sorted(a + b) for a, b in zip(*(rank["keys"] for rank in two), strict=True)] == [
        sorted(keys) for keys in one["keys"]
    ]
    for rank in two:
        assert rank["steps"] == one["steps"] == 8
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prompts_encoded_once_change_nothing(strategy: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank[f"{strategy} encoded once"]["keys"] == rank[strategy]["keys"]
        for name, value in rank[strategy]["weights"].items():
            torch.testing.assert_close(rank[f"{strategy} encoded once"]["weights"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_ends_with_the_same_weights(strategy: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        whole, rest = rank[strategy], rank[f"{strategy} resumed"]
        assert rest["keys"] == whole["keys"][3:]
        assert all(torch.equal(rest["weights"][name], value) for name, value in whole["weights"].items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_are_dealt_out_evenly_where_one_rank_keeps_none(strategy: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[f"{strategy} one rank"] for rank in ranks)
    assert [len(keys) for keys in first["keys"]] == [len(keys) for keys in second["keys"]] == [2] * 8
    assert not {key for keys in first["keys"] for key in keys} & {key for keys in second["keys"] for key in keys}
    assert all(torch.equal(second["weights"][name], value) for name, value in first["weights"].items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_number_of_processes_goes_on_with_the_rows_that_are_left(
    strategy: str, ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    one = saved_run(tmp_path, resume=folder / strategy / "step=3.ckpt")
    rest = [sorted(a + b) for a, b in zip(*(rank[strategy]["keys"][3:] for rank in ranks), strict=True)]
    assert [sorted(keys) for keys in one["keys"]] == rest
