"""Evaluation mode for a block of code, and devices without float64."""

from collections.abc import Callable
from typing import Self

import pytest
import torch
from torch import Tensor, nn

from latentreward.alignment import (
    GDPO,
    Agreement,
    GainCredit,
    GroupAdvantage,
    StepDPO,
    group_advantages,
    scaled_advantages,
)
from latentreward.alignment.losses.nft import optimality
from latentreward.core.contracts import PairScores
from latentreward.core.running import evaluating
from latentreward.reward import ThurstoneLoss
from tests.without_float64 import NarrowDevice, NarrowTensor


class Evaluated(nn.Module):
    """Part in evaluation mode, which nothing sets again."""

    def train(self, mode: bool = True) -> Self:
        raise AssertionError("set without need")


def test_the_mode_of_each_part_is_restored_also_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout().eval())).eval()
    module[0].training = module[1].training = module[1][0].training = True
    module[1].append(Evaluated())
    module[1][2].training = False
    before = [part.training for part in module.modules()]
    with pytest.raises(ValueError, match="inside"), evaluating(module):
        assert not any(part.training for part in module.modules())
        raise ValueError("inside")
    assert [part.training for part in module.modules()] == before == [False, True, True, True, False, False]


GROUPS = torch.tensor([0, 0, 1, 1])


def win_probability(values: Tensor) -> Tensor:
    return ThurstoneLoss().win_probability(PairScores(*values[:6]))


def pruned(values: Tensor) -> Tensor:
    contrast = Agreement.of(values, values.argsort(dim=1)[:, :2], values[:, :2]).contrast
    return scaled_advantages(GroupAdvantage(), values[:, :2], contrast)


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        (lambda values: GroupAdvantage()(values[0], GROUPS.to(values.device)), True),
        (lambda values: GDPO()(values[:4, :2], GROUPS.to(values.device)), True),
        (group_advantages, True),
        (pruned, True),
        (win_probability, True),
        (GainCredit(0.5), False),
        (lambda values: optimality(values[0]), False),
        (lambda values: StepDPO()(*values[:4]).loss, False),
    ],
)
def test_a_device_without_float64_has_the_values_of_the_cpu(function: Callable[[Tensor], Tensor], stays: bool) -> None:
    """Single numbers of samples are computed on the CPU, in float64 as elsewhere."""
    values = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    with NarrowDevice():
        found = function(NarrowTensor(values))
        assert isinstance(found, NarrowTensor) == stays
        assert torch.equal(found.cpu(), function(values))
