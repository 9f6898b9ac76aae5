"""Steps and rollouts do no more than the committed counts, and the counter counts what a GPU would do."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.marks import rotated_after

CASES = (
    "LRM, U-Net",
    "DiNa-LRM, DiT",
    "LPO, U-Net",
    "GRPO, DiT",
    "DiffusionNFT, DiT",
    "step-aware pixel scorer",
    "Diffusion-DPO, U-Net",
    "LPO, DiT",
    "step-wise GRPO, U-Net",
    "AWM, DiT",
    "RAM, DiT",
    "DGPO, DiT",
    "CRD, DiT",
    "on-policy distillation, DiT",
    "DiffusionOPSD, DiT",
    "ReFL, U-Net",
    "PRFL, DiT",
)


@pytest.fixture(scope="module")
def budgets(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("budgets")


@pytest.fixture(scope="module")
def counted(budgets: ModuleType, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Counts of the last step and rollout of the case."""
    kept = budgets.json.loads(budgets.TABLE.read_text())["versions"]
    if kept != budgets.VERSIONS:
        pytest.skip(f"the counts were made with {kept}")
    return budgets.count(request.param)[0]


@pytest.mark.parametrize("counted", rotated_after(5, CASES), indirect=True, ids=CASES)
def test_no_count_has_grown(budgets: ModuleType, counted: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """If a growth is meant, ``python benchmarks/budgets.py CASE --write`` rewrites the table."""
    name = request.node.callspec.id
    assert not budgets.grown(name, counted)
    assert counted["step"].kernels > 500
    more = {part: budgets.Work(work.flops, work.kernels + work.kernels // 40) for part, work in counted.items()}
    kernels = [line for line in budgets.grown(name, more) if "kernels" in line]
    assert kernels[0].startswith(f"{name}, step: ")


def test_every_case_has_counts(budgets: ModuleType) -> None:
    assert sorted(CASES) == sorted(budgets.CASES) == sorted(budgets.json.loads(budgets.TABLE.read_text())["counts"])


def test_views_cost_nothing_and_reads_are_no_kernels(budgets: ModuleType) -> None:
    values = torch.ones(6)
    with budgets.WorkCounter() as counter:
        values.view(2, 3).t().detach()
        torch._foreach_add_([values, values], 1.0)
        values.sum().item()
        if (values > 0).all():
            pass
    assert counter.work == budgets.Work(0, 4, 48 + (24 + 4) + (24 + 6) + (6 + 1), 2)


def test_operations_are_those_of_pytorchs_counter(budgets: ModuleType) -> None:
    layer, states = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context(), FlopCounterMode(display=False) as expected:
            layer(states, states, states)
        with context(), budgets.WorkCounter() as counter:
            layer(states, states, states)
        assert counter.flops == expected.get_total_flops() > 0
