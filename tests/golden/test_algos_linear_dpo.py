"""Linear-DPO, and the sigmoid DPO that it replaces."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from latentreward.alignment import LinearDPO, implicit_rewards
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_within

FLOAT32 = 3e-4
"""The golden numbers were computed in float32: of two nearly equal errors, their difference is off by up to 1.3e-4."""


@pytest.mark.parametrize("case", cases("algos/linear_dpo"), ids=lambda case: case.name)
def test_loss(case: Case) -> None:
    data = case.tensors()
    for variant, options in case.options["variants"].items():
        target, reference = data[f"{variant}.target"], data[f"{variant}.ref_pred"]
        prediction = data[f"{variant}.pred"].clone().requires_grad_()
        if options["linear"]:
            result = LinearDPO(options["eta"])(prediction, reference, target, options["beta"])
            margin, loss = result.margin, result.per_pair.mean()
            assert_within(result.weight, data[f"{variant}.weight"], f"{variant}.weight", FLOAT32)
        else:
            won, lost = implicit_rewards(prediction, reference, target, options["beta"]).chunk(2)
            margin = won - lost
            loss = -logsigmoid(margin).mean()
        (grad,) = torch.autograd.grad(loss, prediction)
        for name, value in {"inside_term": margin, "loss": loss, "grad_pred": grad}.items():
            assert_within(value, data[f"{variant}.{name}"], f"{variant}.{name}", FLOAT32)
