"""Bytes that a step sends: the formula in closed form, and what two processes send in real runs."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from latentreward.apps.estimate.step_costs import PartCosts, StepCosts


@pytest.fixture
def communication(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("communication")


def costs(**values: int) -> StepCosts:
    numbers = dict.fromkeys(("gradients", "state", "saved", "batch_peak", "update_peak", "rollout_peak"), 0)
    parts = (PartCosts("network", 1, 1, 4),)
    return StepCosts(parts=parts, optimizer="SGD", **{**numbers, "forward": 1, "backward": 2, "rollout": 0, **values})


def parts(communication: ModuleType, **values: Any) -> Any:
    """Two batches of four rows a step; a trained layer of 3 × 5 and a frozen one in bfloat16."""
    trained = communication.Weight((3, 5), 4, trains=True)
    frozen = communication.Weight((8, 2), 2, trains=False)
    settings = {
        "gradients": 60,
        "buffers": 0,
        "groups": (
            communication.Group((trained, frozen), {"batch": 2, "rollout": 3}, 1),
            communication.Group((frozen,), {"prompts": 5}, 0),
        ),
        "costs": costs(rollout=1000),
        "batch": 4,
        "accumulated": 2,
        "row": 10.0,
        "rows": 16,
        "prompts": 5,
        "prompt_flops": 7.0,
        "read": 0,
    }
    return communication.Parts(**{**settings, **values})


@pytest.mark.parametrize(("ranks", "rows"), [(2, 4), (8, 8), (64, 64)])
def test_formula_in_closed_form(communication: ModuleType, ranks: int, rows: int) -> None:
    found = parts(communication)
    share = (ranks - 1) / ranks
    assert found.ddp(ranks) == pytest.approx(2 * share * 60)  # once, although two batches are accumulated
    trained, frozen = 20 * rows, 4 * max(8, ranks)  # 3 rows of 5 float32, padded; 8 rows of 2 bfloat16
    batches = 2 * (2 * share * (trained + frozen) + share * trained)
    rollouts = 0.5 * (3 * share * (trained + frozen) + ranks * 5 * share * frozen)  # 8 of a rollout's 16 rows
    assert found.fsdp2(ranks) == pytest.approx(batches + rollouts)
    assert found.exchanged(ranks) == (ranks - 1) * 8 * 10
    assert found.computed(ranks) == (0.5 * (1000 + (ranks - 1) * 5 * 7), 2 * 3)


def test_gathers_of_a_group(communication: ModuleType) -> None:
    gathers = communication.Gathers()
    frozen, first, second = (nn.Linear(2, 2) for _ in range(3))
    whole = nn.Sequential(frozen.requires_grad_(False), first, second)
    for module in (frozen, first, second, whole):
        gathers.add(module)
    with gathers.during("batch", after="backward"):
        whole(torch.ones(1, 2)).sum().backward()
    counted = [(group.gathers, group.reductions, len(group.weights)) for group in gathers.groups()]
    # The frozen layer is gathered ahead in the backward pass of the layer behind it.
    assert counted == [({"batch": 2}, 0, 2), ({"batch": 2}, 1, 2), ({"batch": 2}, 1, 2), ({"batch": 2}, 1, 0)]
    assert len(gathers.groups(without={frozen})) == 3  # text encoders under EncodeOnce
