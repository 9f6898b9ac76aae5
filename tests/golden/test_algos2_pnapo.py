"""PNAPO: Diffusion-DPO whose images are noised with the noises that they were generated from."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import implicit_rewards
from latentreward.core.contracts import PairScores
from latentreward.diffusion import ContinuousFlow
from latentreward.reward import BradleyTerryLoss
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

every_case = pytest.mark.parametrize("case", cases("algos2/pnapo"), ids=lambda case: case.name)
FLOAT32 = 1e-5
"""Implicit rewards are float32 in the package."""


def check_variant(data: Tensors, variant: str, noise: Tensor) -> None:
    process, timesteps = ContinuousFlow(), 1000 * data["t"].repeat(2)
    states, target = (make(data["x0"], noise, timesteps) for make in (process.add_noise, process.target))
    policy = data[f"{variant}.v"].clone().requires_grad_()
    scores = implicit_rewards(policy, data[f"{variant}.v_ref"], target, beta=2.0)  # β / 2 is 1
    chosen, rejected = (scores * data[f"{variant}.beta"].repeat(2)).chunk(2)
    ones = torch.ones_like(chosen)
    pairs = PairScores(chosen, rejected, ones, ones, data["t"], data["t"])
    rows = BradleyTerryLoss().per_pair(pairs)
    loss = BradleyTerryLoss()(pairs)
    (slope,) = torch.autograd.grad(loss, policy)
    found = {"xt": states, "target": target, "score": -scores, "logit": chosen - rejected, "row_loss": rows}
    for name, value in {**found, "loss": loss, "grad_v": slope}.items():
        assert_within(value, data[f"{variant}.{name}"], f"{variant}.{name}", FLOAT32)


@every_case
def test_losses(case: Case) -> None:
    """Each pair's β, which the paper makes of gaps of rewards, is the case's; ours is one for all, as in ``fixed``."""
    data = case.tensors()
    assert (data["reward_gap"] > 0).all()
    for variant, options in case.options["variants"].items():
        noise = data["fresh_noise"].repeat(2, 1, 1, 1) if options["noise"] == "fresh" else data["prior_noise"]
        check_variant(data, variant, noise)
