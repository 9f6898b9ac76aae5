"""Evaluation mode for a block of code."""

import pytest
from torch import nn

from latentreward.devices import evaluating


def test_the_mode_of_each_part_is_restored_also_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout().eval())).eval()
    module[0].train()
    module[1].train()
    module[1][1].eval()
    before = [part.training for part in module.modules()]
    with pytest.raises(ValueError, match="inside"), evaluating(module):
        assert not any(part.training for part in module.modules())
        raise ValueError("inside")
    assert [part.training for part in module.modules()] == before == [False, True, True, True, False]
