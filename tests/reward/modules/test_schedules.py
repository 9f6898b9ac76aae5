"""Learning rates by optimiser step."""

import pytest
import torch
from torch.optim import SGD

from latentreward.reward import WarmupSchedule


def rates(steps: int, **options: object) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupSchedule(optimizer, **options)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"warmup_steps": 2, "decay": "linear", "total_steps": 6}, [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ({"warmup_steps": 2, "decay": "cosine", "total_steps": 6}, [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]),
        ({"decay": "linear", "total_steps": 2}, [1, 0.5, 0]),
    ],
    ids=str,
)
def test_rates(options: dict, expected: list[float]) -> None:
    assert rates(len(expected), **options) == pytest.approx(expected, abs=1e-5)
