"""Evaluation mode for a block of code."""

from typing import Self

import pytest
from torch import nn

from latentreward.devices import evaluating


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
