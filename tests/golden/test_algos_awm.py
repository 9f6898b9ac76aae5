"""Advantage weighted matching: log-probabilities, ratios, divergences and gradients."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import MatchingLoss, velocity_divergence
from latentreward.alignment.losses.clipped_policy import clipped_objective
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

WEIGHTINGS = {"Uniform": "uniform", "t": "t", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}


def loss_of(options: dict) -> MatchingLoss:
    return MatchingLoss(
        WEIGHTINGS[options["weighting"]],
        options["ghuber_power"],
        options["clip_range"],
        options["beta"],
        options["ema_beta"],
        options["kl_weight"].lower(),
        options["adv_clip_max"],
        options["advantage_max"],
    )


@pytest.mark.parametrize("case", cases("algos/awm_loss"), ids=lambda case: case.name)
def test_loss(case: Case) -> None:
    data = case.tensors()
    for variant, options in case.options["variants"].items():
        check_variant(data, f"{variant}.", options)


def check_variant(data: Tensors, variant: str, options: dict) -> None:
    loss, steps = loss_of(options), options["train_timesteps"]
    target, levels = data[variant + "noise"] - data[variant + "x0"], data[variant + "t"]
    velocity = data[variant + "v"].clone().requires_grad_()
    log_prob = loss.log_prob(velocity, target, levels)
    old_log_prob = loss.log_prob(data[variant + "v_old"], target, levels)
    kl = velocity_divergence(velocity, data[variant + "v_ref"], levels, loss.divergence)
    average_kl = velocity_divergence(velocity, data[variant + "v_ema"], levels, options["kl_ema_weight"].lower())
    advantages = data[variant + "advantages"].repeat(steps)
    rows: tuple[Tensor, Tensor, Tensor] = log_prob, old_log_prob, advantages
    if options["loss_type"] == "sum_first":  # one ratio per sample, of its mean log-probability
        rows = (*(each.view(steps, -1).mean(dim=0) for each in rows[:2]), data[variant + "advantages"])
    result = loss(*rows, kl, average_kl)
    _, ratio, _ = clipped_objective(rows[0] - rows[1], rows[2], loss.clip_range)
    found = {
        "log_prob": log_prob,
        "old_log_prob": old_log_prob,
        "ratio": ratio,
        "policy_loss": result.policy,
        "kl_loss": result.kl,
        "loss": result.loss,
        "grad_v": torch.autograd.grad(result.loss, velocity)[0],
        "std_dev_t": 0.7 * (levels / (1 - levels.clamp(max=0.99))).sqrt(),
    }
    if options["ema_beta"]:
        found["ema_kl_loss"] = result.average_kl
    for name, value in found.items():
        assert_within(value, data[variant + name], variant + name, 2e-5)
