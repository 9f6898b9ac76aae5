"""Step-level DPO: losses, ratios and gradients against the recorded ones, the overflowing rows in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import DDIMSampler, StepDPO, clamped_log_ratio
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close

every_case = pytest.mark.parametrize("case", cases("lpo/06"), ids=lambda case: case.name)
LOSS = {"rtol": 1e-4, "atol": 1e-4}  # float32 keeps 6e-8 of a log-ratio, which β = 500 multiplies


def inputs(data: Any, key: str) -> list[Tensor]:
    sides = ("logp_win", "logp_lose")
    policy = [data[f"{key}.{side}"].clone().requires_grad_() for side in sides]
    return [*policy, *(data[f"{key}.{side}_ref"] for side in sides)]


@every_case
def test_variants(case: Case) -> None:
    data = case.tensors()
    for variant in case.options["variants"]:
        key, beta, clip_range = variant["name"], variant["beta"], variant["eps"]
        win, lose, ref_win, ref_lose = inputs(data, key)
        result = StepDPO(beta, clip_range)(win, lose, ref_win, ref_lose)
        result.loss.backward()
        assert_close(result.loss, data[f"{key}.loss"], f"{key}.loss", **LOSS)
        for side, log_prob, reference in (("win", win, ref_win), ("lose", lose, ref_lose)):
            ratio = clamped_log_ratio(log_prob, reference, clip_range).exp()
            assert_close(ratio, data[f"{key}.ratio_{side}"], f"{key}.ratio_{side}")
            golden = data[f"{key}.grad_logp_{side}"]
            assert_close(log_prob.grad, golden, f"{key}.grad_logp_{side}", rtol=1e-4, atol=1e-4)
        if f"{key}.implicit_acc" in data:
            assert_close(result.implicit_accuracy, data[f"{key}.implicit_acc"], f"{key}.implicit_acc")
            assert_close(result.margin, data[f"{key}.margin"], f"{key}.margin")


@every_case
def test_rows_that_overflow_in_the_released_form(case: Case) -> None:
    data, options = case.tensors(), case.options
    variant = next(variant for variant in options["variants"] if variant["name"] == "clamped64")
    win, lose, ref_win, ref_lose = inputs(data, "clamped64")
    loss = StepDPO(variant["beta"], variant["eps"])
    rows = [loss(*(column[i : i + 1] for column in (win, lose, ref_win, ref_lose))).loss for i in range(len(win))]
    assert_close(torch.stack(rows), data["clamped64.row_loss"], "row_loss", rtol=1e-6, atol=1e-6)
    overflowing = data["clamped64.reference_float32_row_is_inf"]
    assert overflowing.any()
    assert torch.stack(rows)[overflowing].isfinite().all()


@every_case
def test_from_predictions_to_gradients(case: Case) -> None:
    data, options = case.tensors(), case.options["e2e"]
    ddim = cases("lpo/05")[0]  # whose scheduler and number of steps this case shares
    sampler = DDIMSampler(ddim.options["scheduler_config"], ddim.options["num_inference_steps"], options["eta"])
    text, uncond = (data[f"e2e.eps_{kind}"].clone().requires_grad_() for kind in ("text", "uncond"))
    log_probs = []
    predictions = ((text, uncond, ""), (data["e2e.eps_text_ref"], data["e2e.eps_uncond_ref"], "_ref"))
    for with_prompt, without, suffix in predictions:
        guided = without + options["guidance_scale"] * (with_prompt - without)
        transition = sampler.transition(data["e2e.latents"], guided, data["e2e.timesteps"])
        for side in ("win", "lose"):
            log_prob = transition.log_prob(data[f"e2e.next_{side}"])
            assert_close(log_prob, data[f"e2e.logp_{side}{suffix}"], f"logp_{side}{suffix}", rtol=1e-4, atol=1e-5)
            log_probs.append(log_prob)
    result = StepDPO(options["beta"], options["eps"])(*log_probs)
    result.loss.backward()
    for side, policy, reference in (("win", *log_probs[::2]), ("lose", *log_probs[1::2])):
        ratio = clamped_log_ratio(policy, reference, options["eps"]).exp()
        assert_close(ratio, data[f"e2e.ratio_{side}"], f"ratio_{side}", rtol=1e-5, atol=1e-5)
    # a log-probability of float32 elements is good to some 1e-7, which β = 500 multiplies
    assert_close(result.loss, data["e2e.loss"], "loss", rtol=1e-3, atol=1e-3)
    for kind, prediction in (("text", text), ("uncond", uncond)):
        golden = data[f"e2e.grad_eps_{kind}"]
        assert_close(prediction.grad, golden, f"grad_eps_{kind}", rtol=1e-3, atol=1e-3 * golden.abs().max().item())
