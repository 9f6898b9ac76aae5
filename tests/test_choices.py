"""Settings with a few named values are refused in one line, also where they are given in Python."""

from collections.abc import Callable
from typing import Any

import pytest
from latentreward.callbacks import CollapseGuard

from latentreward.alignment import (
    Branching,
    ClippedPolicyLoss,
    CRDLoss,
    GroupAdvantage,
    MatchingLoss,
    NFTLoss,
    OnPolicyLoss,
    RAMLoss,
    TurningPointCredit,
)
from latentreward.core.errors import InputError
from latentreward.reward import LRMLoss, PairwiseAccuracy, ThurstoneLoss


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (ThurstoneLoss, {"objective": "nlll"}),
        (LRMLoss, {"mode": "pairs"}),
        (ClippedPolicyLoss, {"step_weight": "noisy"}),
        (CRDLoss, {"form": "mae"}),
        (NFTLoss, {"signs": "positive"}),
        (NFTLoss, {"space": "clear"}),
        (MatchingLoss, {"weighting": "t3"}),
        (MatchingLoss, {"divergence": "kl"}),
        (OnPolicyLoss, {"factor": None}),
        (RAMLoss, {"residual": ["old"]}),
        (PairwiseAccuracy, {"equal": "right"}),
        (GroupAdvantage, {"std": "none of them"}),
        (GroupAdvantage, {"ddof": 2}),
        (Branching, {"continue_from": "first"}),
        (Branching, {"score_at": "steps"}),
        (TurningPointCredit, {"main": "remaining"}),
        (CollapseGuard, {"prompts": ["a cat"], "action": "halt"}),
    ],
)
def test_unknown_values_are_refused(build: Callable[..., Any], settings: dict[str, Any]) -> None:
    name, value = [*settings.items()][-1]
    with pytest.raises(InputError) as caught:
        build(**settings)
    text = str(caught.value)
    assert text.startswith(f"{build.__name__}: {name}={value!r} is not known; ") and "\n" not in text
