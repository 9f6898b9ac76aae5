"""Diffusion-DPO: loss, parts and gradient against the recorded ones."""

import pytest
import torch

from latentreward.alignment import denoising_error, implicit_rewards
from latentreward.core.contracts import PairScores
from latentreward.reward import BradleyTerryLoss
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close


@pytest.mark.parametrize("case", cases("lpo/11"), ids=lambda case: case.name)
def test_variants(case: Case) -> None:
    data = case.tensors()
    for variant in case.options["variants"]:
        key = variant["name"]
        prediction = data[f"{key}.model_pred"].clone().requires_grad_()
        reference, target = data[f"{key}.ref_pred"], data[f"{key}.target"]
        chosen, rejected = implicit_rewards(prediction, reference, target, variant["beta_dpo"]).chunk(2)
        ones, levels = torch.ones(len(chosen)), torch.full((len(chosen),), 0.5)
        scores = PairScores(chosen, rejected, ones, ones, levels, levels)
        loss = BradleyTerryLoss()(scores)
        loss.backward()
        # the recorded argument is a difference of float32 errors, times β / 2
        assert_close(scores.margin, data[f"{key}.inside_term"], f"{key}.inside_term", rtol=1e-4, atol=2e-3)
        assert_close(loss, data[f"{key}.loss"], f"{key}.loss", rtol=1e-3, atol=1e-4)
        assert_close(prediction.grad, data[f"{key}.grad_model_pred"], f"{key}.grad_model_pred", rtol=1e-3, atol=1e-4)
        accuracy = (scores.margin > 0).float().mean()
        assert_close(accuracy, data[f"{key}.implicit_acc"], f"{key}.implicit_acc")
        errors = {"raw_model_loss": prediction, "raw_ref_loss": reference}
        for name, output in errors.items():
            assert_close(denoising_error(output, target).mean(), data[f"{key}.{name}"], f"{key}.{name}")
