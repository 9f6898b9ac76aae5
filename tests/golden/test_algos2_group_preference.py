"""DGPO and CRD: weights, losses and gradients of their variants, and the decay of CRD's two copies."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import CRDLoss, CRDResult, DGPOLoss
from latentreward.alignment.losses.matching import squared_error
from latentreward.alignment.losses.nft import optimality
from latentreward.alignment.policies.moving_average import DecayRamp
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

every_case = pytest.mark.parametrize("case", cases("algos2/group_preference"), ids=lambda case: case.name)


def variants(case: Case, method: str) -> dict[str, dict]:
    return {name: own for name, own in case.options["variants"].items() if own["method"] == method}


def compare(data: Tensors, variant: str, found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        # The loss itself is float32.
        assert_within(value, data[f"{variant}.{name}"], f"{variant}.{name}", 1e-6 if name == "loss" else 1e-8)


@every_case
def test_noised_samples(case: Case) -> None:
    """One noise and one level for a group."""
    data = case.tensors()
    groups = data["groups"].unique(return_inverse=True)[1]
    noise, clean = data["shared_noise"][groups], data["x0"]
    level = data["t"].view(-1, *[1] * (clean.ndim - 1))
    assert_within(noise - clean, data["target"], "target", 1e-8)
    assert_within((1 - level) * clean + level * noise, data["xt"], "xt", 1e-8)


@every_case
def test_dgpo(case: Case) -> None:
    data = case.tensors()
    for variant, options in variants(case, "dgpo").items():
        loss = DGPOLoss(options["beta"], options["kl"], options.get("clip"), options["max_advantage"])
        velocity = data["v"].clone().requires_grad_()
        old, target, count = data["v_old"], data["target"], options["group_size"]
        compared = old if options["reference"] == "old" else data["v_ref"]
        advantage = data["advantages"].view(-1, count)
        result = loss(velocity, old, target, advantage, compared)
        if compared is old:  # the KL term of this variant stays that to the reference
            kl = squared_error(velocity, data["v_ref"]).mean()
            (result.loss.double() + loss.kl_weight * (kl - squared_error(velocity, old).mean())).backward()
        else:
            kl = result.kl
            result.loss.backward()
        errors = {f"dsm{end}": squared_error(one, target).detach()
                  for end, one in (("", velocity), ("_reference", compared), ("_old", old))}  # fmt: skip
        found = {**errors, "group_weight": result.weight, "group_sum": result.weight.logit(), "kl": kl.detach(),
                 "policy_loss": result.policy, "loss": result.policy + loss.kl_weight * kl.detach(),
                 "grad_v": velocity.grad}  # fmt: skip
        if "clip" in options:
            found["ratio"] = (errors["dsm_old"] - errors["dsm"]).exp()
            assert torch.equal(result.clipped.flatten(), data[f"{variant}.clipped"])
        compare(data, variant, found)


@every_case
def test_crd(case: Case) -> None:
    data = case.tensors()
    for variant, options in variants(case, "crd").items():
        count = (
            len(data["advantages"])
            if options["scope"] == "batch"
            else len(data["groups"]) // len(data["groups"].unique())
        )
        temperature = options["temperature"] if options["temperature"] > 0 else None
        settings = options["beta"], options["kl"], options["max_advantage"], temperature, options["form"]
        loss = CRDLoss(*settings, adaptive=options["adaptive"])
        assert options["adaptive"] == options["adaptive_kl"]
        velocity = data["v"].clone().requires_grad_()
        advantage = data["advantages"].view(-1, count)
        result = loss(velocity, data["v_old"], data["target"], advantage, data["v_ref"])
        total = result.loss
        if options["temperature"] == 0:
            result, total = released_at_temperature_0(loss, velocity, data, advantage)
        total.backward()
        found = {"implicit_reward": result.implicit.flatten(), "row_loss": result.rows.flatten(),
                 "advantage01": optimality(advantage, loss.max_advantage).flatten(), "policy_loss": result.policy,
                 "kl_loss": loss.kl_weight * result.kl, "loss": total.detach(), "grad_v": velocity.grad}  # fmt: skip
        if options["adaptive"]:
            for end, output in (("", data["v"]), ("_old", data["v_old"])):
                found[f"weight{end}"] = (data["target"] - output).flatten(1).abs().mean(dim=1)
        compare(data, variant, found)


def released_at_temperature_0(
    loss: CRDLoss, velocity: Tensor, data: Tensors, advantage: Tensor
) -> tuple[CRDResult, Tensor]:
    """The released code's temperature 0, which the package leaves out.

    It looks for negative r, of which there are none: their mean is over all samples.
    """
    result = loss(velocity, data["v_old"], data["target"], advantage, data["v_ref"])
    share = optimality(advantage, loss.max_advantage)
    implicit = result.implicit + (error := loss._error(velocity, data["target"]).view_as(share)).detach() - error
    positive = share.where(share > 0, -torch.inf).softmax(dim=1)
    sides = [loss.centred(implicit, share, one) for one in (positive, torch.full_like(share, 1 / share.shape[1]))]
    rows = (sides[0] + sides[1]) / 2
    policy = loss.max_advantage / loss.beta * rows.mean()
    least = 1e-4 / loss.kl_weight
    drift = squared_error(velocity, data["v_ref"]).view_as(share)
    kl = ((least + share * (1 - least)) * drift).mean()
    return result._replace(rows=rows.detach(), policy=policy.detach()), policy + loss.kl_weight * kl


@every_case
def test_decay_of_crds_copies(case: Case) -> None:
    """``NAME START-FIRST-SLOPE-MOST``; a first decay above 0 is a start before the run."""
    for setting, wanted in case.options["crd_decay"].items():
        start, first, slope, most = (float(one) for one in setting.split(" ")[1].split("-"))
        ramp = DecayRamp(slope, most, round(start - first / slope))
        for step, decay in wanted.items():
            assert ramp.decay(int(step)) == pytest.approx(decay)
