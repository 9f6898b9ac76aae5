"""LayerMix: the score by hand, and that every tap matters."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from latentreward.reward import LayerMixHead
from tests.reward.heads.features import SPECS, random_features


@pytest.mark.parametrize("name", SPECS)
def test_score_by_hand(name: str) -> None:
    head, given = LayerMixHead(SPECS[name], width=6).double(), random_features(SPECS[name], dtype=torch.float64)
    given = replace(given, visual=tuple(tokens / 3 for tokens in given.visual))  # no float32 numbers
    pooled = torch.cat([tokens.sum(dim=1) / tokens.shape[1] for tokens in given.visual], dim=1)
    centred = pooled - pooled.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    first, last = head.mlp[1], head.mlp[3]
    expected = F.silu(normed @ first.weight.T + first.bias) @ last.weight[0] + last.bias
    assert head(given).dtype == torch.float64
    torch.testing.assert_close(head(given), expected, rtol=1e-12, atol=1e-12)
    for index in range(len(given.visual)):
        visual = tuple(v + torch.randn(v.shape[2]) * (i == index) for i, v in enumerate(given.visual))
        assert not torch.allclose(head(replace(given, visual=visual)), head(given))
