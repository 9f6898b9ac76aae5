"""RAM: advantages, targets, losses and gradients of its variants, and the policy that samples."""

import math

import pytest
import torch
from torch import Tensor

from latentreward.alignment import GroupAdvantage, RAMLoss
from latentreward.alignment.policies.moving_average import DecayRamp, move_towards
from latentreward.diffusion import PowerSigma
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within
from tests.golden.small_networks import output_of, weights_of

every_case = pytest.mark.parametrize("case", cases("algos2/ram"), ids=lambda case: case.name)
FLOAT32 = 1e-6
"""Advantages, levels and decays are float32 in the package."""


def draws_of(data: Tensors) -> int:
    """J, the draws of a sample, which are adjacent."""
    return len(data["uniform"]) // len(data["rewards"])


def noised(data: Tensors, variant: str, options: dict) -> tuple[Tensor, Tensor]:
    """States and true targets at the case's levels."""
    clean, noise = data["x0"].repeat_interleave(draws_of(data), dim=0), data["noise"]
    column = data[f"{variant}.t"].view(-1, *[1] * (clean.ndim - 1))
    if options.get("alpha") == "vp":
        return (math.pi / 2 * column).cos() * clean + (math.pi / 2 * column).sin() * noise, noise
    return (1 - column) * clean + column * noise, noise - clean


@every_case
def test_losses(case: Case) -> None:
    data = case.tensors()
    for variant, options in case.options["variants"].items():
        check_variant(data, variant, options)


def check_variant(data: Tensors, variant: str, options: dict) -> None:
    loss = RAMLoss(options["multiplier"], options["residual"])
    clip = options.get("clip", math.inf)
    advantage = data["advantages"].clamp(-clip, clip).repeat_interleave(draws_of(data))
    condition, level = data["condition"].repeat_interleave(draws_of(data)), data[f"{variant}.t"]
    states, true = noised(data, variant, options)
    weights = {name: weights_of(data, name) for name in ("reference", "old", "policy")}
    outputs = {name: output_of(own, states, level, condition) for name, own in weights.items()}
    policy = outputs["policy"]
    older = outputs["old"] if options["residual"] == "old" else policy
    rows = loss(policy, older, outputs["reference"], true, advantage)
    rows.mean().backward(inputs=[policy, *weights["policy"].values()])
    found = {
        "xt": states,
        **{f"output_{name}": output for name, output in outputs.items()},
        "target": loss.target(outputs["reference"], older, true, advantage),
        "row_loss": rows,
        "loss": rows.mean(),
        "grad_output": policy.grad,
        **{f"grad.{name}": weight.grad for name, weight in weights["policy"].items()},
    }
    for name, value in found.items():
        assert_within(value, data[f"{variant}.{name}"], f"{variant}.{name}", 1e-8)
    # The reference and the older policy never learn.
    assert all(weight.grad is None for name in ("reference", "old") for weight in weights[name].values())


@every_case
def test_levels(case: Case) -> None:
    """Density (1 + power)·t^power: ``PowerSigma`` takes the exponent of the uniform number."""
    data = case.tensors()
    for variant, options in case.options["variants"].items():
        levels = PowerSigma(1 / (1 + options["power"])).transform(data["uniform"], torch.zeros_like(data["uniform"]))
        assert_within(levels, data[f"{variant}.t"], f"{variant}.t", 1e-8)


@every_case
def test_advantages(case: Case) -> None:
    data = case.tensors()
    groups = data["condition"].unique(return_inverse=True)[1]
    assert_within(GroupAdvantage("all")(data["rewards"], groups), data["advantages"], "advantages", FLOAT32)


@every_case
def test_old_policy(case: Case) -> None:
    data, ramp = case.tensors(), DecayRamp(0.01, 0.9)
    old = {name: weight.detach() for name, weight in weights_of(data, "old").items()}
    for index, step in enumerate(case.options["behaviour_steps"]):
        for name, weight in old.items():
            move_towards(weight, data[f"behaviour.step{index}.policy.{name}"], ramp.decay(step))
            assert_within(weight, data[f"behaviour.step{index}.old.{name}"], f"{name} after {step}", 1e-8)
