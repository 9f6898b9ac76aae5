"""DiffusionOPSD: the climb of the reward, both branches of the loss with gradients, and the policy that samples."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from latentreward.alignment import NFTLoss, reward_ascent
from latentreward.alignment.losses.nft import optimality, self_normaliser
from latentreward.alignment.policies.moving_average import DecayRamp, move_towards
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within
from tests.golden.small_networks import output_of, weights_of

every_case = pytest.mark.parametrize("case", cases("algos2/opsd"), ids=lambda case: case.name)
SIDES = ("plus", "minus")
FLOAT32 = 2e-5
"""The sum that ``NFTLoss`` returns is float32, and so the gradients that pass through it; its parts are float64."""
Branches = dict[str, tuple[Tensor, Tensor]]


def reward_of(data: Tensors, latents: Tensor) -> Tensor:
    a, w, b, q, m = (data[f"reward.{name}"] for name in "awbqm")
    flat = latents.flatten(1)
    return (flat @ w.T + b).tanh() @ a - q / 2 * (flat - m).square().mean(dim=1)


def output_at_queries(weights: Mapping[str, Tensor], data: Tensors, options: dict) -> Tensor:
    """Output for the queries, with guidance if the variant has it."""
    levels = torch.full_like(data["advantages"], options["sigma"])
    with_prompt, without = (
        output_of(weights, data["query"], levels, condition)
        for condition in (data["condition"], torch.zeros_like(data["condition"]))
    )
    return without + options["guidance"] * (with_prompt - without) if options["guidance"] != 1.0 else with_prompt


def climb(data: Tensors, options: dict, anchor: Tensor) -> dict[str, Tensor]:
    """Radius and targets, and what was seen on the way: states after each step, gradients, and rewards."""
    found: dict[str, Tensor] = {}
    level, direction, steps = options["reward_sigma"], options["direction"], options["steps"]
    names = iter(["plus1", *(f"{side}{step}" for side in SIDES for step in range(2, steps + 1))])

    def scored(latents: Tensor) -> Tensor:
        return reward_of(data, (1 - level) * latents + level * data["reward_noise"])

    def slope_of(latents: Tensor) -> Tensor:
        name = next(names)
        if (step := int(name[-1])) > 1:
            found[f"{name[:-1]}.step{step - 1}"] = latents
        if direction != "gradient":
            return data["endpoint"] - anchor if direction == "residual" else torch.zeros_like(latents)
        leaf = latents.clone().requires_grad_()
        found[f"reward_gradient.{name}"] = torch.autograd.grad(scored(leaf).sum(), leaf)[0]
        return found[f"reward_gradient.{name}"]

    found["budget"] = options["rho"] * anchor.flatten(1).norm(dim=1)
    ends = reward_ascent(anchor, slope_of, found["budget"], steps, options["eta"])
    assert not any(names), "a gradient that was not asked for"
    for side, end in zip(SIDES, ends, strict=True):
        found |= {f"{side}.step{steps}": end, f"target_{side}": end, f"reward_{side}": scored(end)}
    return {**found, "reward_anchor": scored(anchor)}


def branches(loss: NFTLoss, output: Tensor, old: Tensor, ends: tuple[Tensor, Tensor], levels: Tensor) -> Branches:
    """Errors of each branch by row, and their gradients to the output: those of good, and of bad samples alone."""
    found = {}
    for side, sign in zip(SIDES, (1.0, -1.0), strict=True):
        advantage = torch.full_like(levels, sign * loss.max_advantage)
        result = loss(output, old, ends, levels, advantage)
        (grad,) = torch.autograd.grad(result.loss, output, retain_graph=True)
        found[side] = (result.positive if side == "plus" else result.negative, grad)
    return found


def combined(parts: Branches, weights: Mapping[str, Tensor], factor: float) -> tuple[Tensor, Tensor]:
    """Loss of both branches with weights of rows, and its gradient to the output."""
    loss = factor * sum((weights[side] * rows).mean() for side, (rows, _) in parts.items())
    grads = (weights[side].view(-1, *[1] * (grad.ndim - 1)) * grad for side, (_, grad) in parts.items())
    return loss, sum(grads)


@every_case
def test_variants(case: Case) -> None:
    data = case.tensors()
    for variant, options in case.options["variants"].items():
        check_variant(data, variant, options)


def check_variant(data: Tensors, variant: str, options: dict) -> None:
    weights = {name: weights_of(data, name) for name in ("old", "policy")}
    old, output = (output_at_queries(own, data, options) for own in weights.values())
    signal = options["alpha"] if variant == "epsilon" else 1.0
    level = options["sigma"] / signal  # clean latents are query / signal − level · output
    anchor = (data["query"] / signal - level * old).detach()
    found = {"output_old": old, "output": output, "anchor": anchor, **climb(data, options, anchor)}

    beta, bound = options["beta"], options["max_advantage"]
    found["r"] = optimality(data["advantages"], bound)
    shares = {"plus": found["r"], "minus": 1 - found["r"]}
    kept = {side: data[f"accepted_{side}"] if options["gated"] else torch.ones_like(found["r"]) for side in SIDES}
    if not options["both"]:
        kept["minus"] = torch.zeros_like(found["r"])
    loss, levels = NFTLoss(beta, 0.0, bound), torch.full_like(data["advantages"], level)
    ends = [(data["query"] / signal - found[f"target_{side}"]) / level for side in SIDES]
    parts = branches(loss, output, old, (ends[0], ends[1]), levels)
    total, grad = combined(parts, {side: shares[side] * kept[side] for side in SIDES}, bound)
    if "aux" in options:  # DiffusionNFT's own loss, and a share of OPSD's
        finished = (data["query"] - data["endpoint"]) / level
        main = branches(loss, output, old, (finished, finished), levels)
        more, slope = combined(main, shares, bound / beta)
        total, grad = options["aux"] * total + more, options["aux"] * grad + slope / beta
        found |= {f"main_{side}_loss": rows for side, (rows, _) in main.items()}
    mixed = (beta * output + (1 - beta) * old, (1 + beta) * old - beta * output)
    for side, end, velocity in zip(SIDES, ends, mixed, strict=True):
        found[f"{side}_loss"] = kept[side] * parts[side][0]
        found[f"weight_{side}"] = self_normaliser((level * (end - velocity)).flatten(1))
    output.backward(grad, inputs=list(weights["policy"].values()))
    found |= {"loss": total, "grad_output": grad}
    found |= {f"grad.{name}": weight.grad for name, weight in weights["policy"].items()}
    for name in data.below(f"{variant}."):
        tolerance = FLOAT32 if name.startswith("grad") else 1e-8
        assert_within(found[name], data[f"{variant}.{name}"], f"{variant}.{name}", tolerance)


@every_case
def test_the_loss_as_a_whole(case: Case) -> None:
    data, options = case.tensors(), case.options["variants"]["shipped"]
    output = data["shipped.output"].clone().requires_grad_()
    ends = [(data["query"] - data[f"shipped.target_{side}"]) / options["sigma"] for side in SIDES]
    levels = torch.full_like(data["advantages"], options["sigma"])
    old = data["shipped.output_old"]
    loss = NFTLoss(kl_weight=0.0)(output, old, (ends[0], ends[1]), levels, data["advantages"]).loss
    loss.backward()
    assert_within(loss, data["shipped.loss"], "loss", FLOAT32)
    assert_within(output.grad, data["shipped.grad_output"], "grad_output", FLOAT32)


@every_case
def test_old_policy(case: Case) -> None:
    data, ramp = case.tensors(), DecayRamp()
    old = {name: weight.detach() for name, weight in weights_of(data, "old").items()}
    for index, step in enumerate(case.options["behaviour_global_steps"]):
        for name, weight in old.items():
            move_towards(weight, data[f"behaviour.step{index}.policy.{name}"], ramp.decay(step))
            assert_within(weight, data[f"behaviour.step{index}.old.{name}"], f"{name} after {step}", 1e-8)
